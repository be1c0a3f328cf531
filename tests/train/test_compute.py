import pytest
import torch

from oneword.train import compute
from oneword.train.compute import compute_dtype, few_positions
from oneword.train.recipe import Compute


def test_few_positions_use_plain_attention() -> None:
    assert few_positions(torch.float32, 256)
    assert few_positions(torch.bfloat16, 1024)
    assert not few_positions(torch.float32, 257)
    assert not few_positions(torch.bfloat16, 1025)


@pytest.mark.parametrize(("fast", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bf16_if_the_processor_multiplies_it_natively(
    monkeypatch: pytest.MonkeyPatch, fast: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(compute, "has_fast_bf16", lambda: fast)

    assert compute_dtype(Compute.AUTO) is expected
    assert compute_dtype(Compute.FP32) is torch.float32
    assert compute_dtype(Compute.BF16) is torch.bfloat16
