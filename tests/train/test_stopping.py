import pytest

from oneword.train.stopping import dvar, has_settled


def test_the_ratio_is_by_hand() -> None:
    # all: 0, 4, 1, 1 has mean 1.5 and variance (2.25 + 6.25 + 0.25 + 0.25) / 4 = 2.25; the last two do not vary
    assert dvar([0.0, 4.0, 1.0, 3.0], window=2) == pytest.approx(1.0 / 2.5)
    assert dvar([0.0, 4.0, 1.0, 1.0], window=2) == 0.0


def test_nothing_has_settled_before_the_window_is_full() -> None:
    assert not has_settled([1.0, 1.0], below=0.5, window=2)
    assert has_settled([9.0, 1.0, 1.0], below=0.5, window=2)
    assert not has_settled([1.0, 1.0, 9.0], below=0.5, window=2)
