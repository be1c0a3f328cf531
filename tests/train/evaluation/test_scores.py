import numpy as np
import pytest

from oneword.train.evaluation.scores import Formula, editability, likeness, likeness_within, unit


def test_scores_by_hand() -> None:
    x, y, diagonal = [1.0, 0.0], [0.0, 1.0], [0.5**0.5, 0.5**0.5]
    samples = np.array([x, y], np.float32)

    assert likeness(samples, np.array([x], np.float32)) == pytest.approx(0.5)
    assert likeness_within(np.array([x, y, x], np.float32)) == pytest.approx(1 / 3)
    # the mean of x and y is along the diagonal, at cosine 1; each alone is at cosine 0.7071
    assert editability(samples, np.array(diagonal, np.float32)) == pytest.approx(1.0)
    assert editability(samples, np.array(diagonal, np.float32), Formula.RELEASE) == pytest.approx(0.5**0.5)
    np.testing.assert_allclose(unit(np.array([[3.0, 4.0]], np.float32)), [[0.6, 0.8]], rtol=1e-6)
