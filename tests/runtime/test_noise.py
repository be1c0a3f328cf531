"""The noise stream against torch's CPU generator."""

import numpy as np
import pytest
import torch

from oneword.engines.errors import UsageError
from oneword.runtime.noise import TorchGenerator

SHAPES = [(1,), (3,), (15,), (16,), (17,), (31,), (32,), (1, 4, 8, 8), (3, 5, 7), (4, 64, 64), (1, 8, 8, 9), (2, 0), ()]


@pytest.mark.parametrize("seed", [0, 1, 42, 2**32 - 1, 2**32 + 5, 2**63 + 11, -1])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_first_draw_equals_torchs(seed: int, shape: tuple[int, ...]) -> None:
    expected = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).numpy()
    drawn = TorchGenerator(seed).randn(shape)
    assert drawn.shape == shape
    assert drawn.dtype == np.float32
    np.testing.assert_allclose(drawn, expected, rtol=0, atol=5e-7)


def test_two_hundred_draws_of_mixed_shapes_equal_torchs() -> None:
    choice = np.random.default_rng(3)
    generator, stream = torch.Generator().manual_seed(7), TorchGenerator(7)
    for _ in range(200):
        shape = SHAPES[choice.integers(len(SHAPES))]
        expected = torch.randn(shape, generator=generator).numpy()
        np.testing.assert_allclose(stream.randn(shape), expected, rtol=0, atol=5e-7)


def test_a_million_values_are_within_the_stated_bound_and_most_are_equal_bit_for_bit() -> None:
    expected = torch.randn(1_000_000, generator=torch.Generator().manual_seed(5)).numpy()
    drawn = TorchGenerator(5).randn((1_000_000,))
    assert np.abs(drawn - expected).max() <= 5e-7
    assert (drawn == expected).mean() > 0.5


def test_the_underlying_uniforms_equal_torchs_bit_for_bit() -> None:
    expected = torch.rand(1_000, generator=torch.Generator().manual_seed(9)).numpy()
    np.testing.assert_array_equal(TorchGenerator(9)._uniforms(1_000), expected)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_that_torch_refuses_is_refused(seed: int) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        torch.Generator().manual_seed(seed)
    with pytest.raises(UsageError, match="outside"):
        TorchGenerator(seed)
