import pytest
import torch
from diffusers import DDPMScheduler

from oneword.train.losses import distance_to_start, min_snr_weights


@pytest.mark.parametrize(
    ("kind", "expected"),  # SNR 3 and 1/3 with gamma 1, by hand
    [("epsilon", [1 / 3, 1.0]), ("v_prediction", [1 / 4, 1 / 4]), ("sample", [1.0, 1 / 3])],
)
def test_min_snr_weights_by_hand(kind: str, expected: list[float]) -> None:
    scheduler = DDPMScheduler(prediction_type=kind)
    scheduler.alphas_cumprod = torch.tensor([0.75, 0.25])

    weights = min_snr_weights(scheduler, torch.tensor([0, 1]), 1.0)

    torch.testing.assert_close(weights, torch.tensor(expected))


def test_the_distance_to_the_initial_rows_by_hand() -> None:
    """Two rows that moved by (3, 4) and 0: (25 + 0) / 2; the other encoder's row moved by 1 in one dimension."""
    rows = {"one": torch.tensor([[3.0, 4.0], [0.0, 0.0]]), "two": torch.tensor([[1.0, 1.0, 2.0]])}
    initial = {"one": torch.zeros(2, 2), "two": torch.ones(1, 3)}

    assert distance_to_start(rows, initial) == torch.tensor(13.5)
