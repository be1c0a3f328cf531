import pytest

from oneword.train.stopping import dvar, has_settled


def test_the_ratio_by_hand() -> None:
    # 0, 4, 1, 3 has mean 2 and variance (4 + 4 + 1 + 1) / 4 = 2.5, its last two 1; 0, 4, 1, 1 ends without variance
    assert dvar([0.0, 4.0, 1.0, 3.0], window=2) == pytest.approx(1.0 / 2.5)
    assert dvar([0.0, 4.0, 1.0, 1.0], window=2) == 0.0


def test_nothing_has_settled_before_the_window_is_full() -> None:
    assert not has_settled([1.0, 1.0], below=0.5, window=2)
    assert has_settled([9.0, 1.0, 1.0], below=0.5, window=2)
    assert not has_settled([1.0, 1.0, 9.0], below=0.5, window=2)
