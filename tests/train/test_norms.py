import torch

from oneword.train.norms import with_norm
from oneword.train.recipe import Norm


def test_lengths_are_left_set_or_pulled() -> None:
    rows = torch.tensor([[3.0, 4.0]])

    assert with_norm(rows, Norm.FREE, 1.0, 0.001) is rows
    torch.testing.assert_close(with_norm(rows, Norm.FIXED, 1.0, 0.001), torch.tensor([[0.6, 0.8]]))
    # length 5 pulled towards 1 by 100 * 0.001 = a tenth of the way: 4.6
    torch.testing.assert_close(with_norm(rows, Norm.DECAYED, 1.0, 0.001), torch.tensor([[0.6, 0.8]]) * 4.6)
