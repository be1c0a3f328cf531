import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from oneword.train import compute
from oneword.train.compute import attention, compute_dtype
from oneword.train.recipe import Compute


def test_few_positions_are_attended_plainly() -> None:
    assert attention(torch.float32, 256) is attention(torch.bfloat16, 1024) is AttnProcessor
    assert attention(torch.float32, 257) is attention(torch.bfloat16, 1025) is AttnProcessor2_0


@pytest.mark.parametrize(("fast", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bf16_if_the_processor_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, fast: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(compute, "has_fast_bf16", lambda: fast)

    assert compute_dtype(Compute.AUTO) is expected
    assert compute_dtype(Compute.FP32) is torch.float32
    assert compute_dtype(Compute.BF16) is torch.bfloat16
