"""Lowered programs compute what their modules do, and are not traced again."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from oneword.export.families import family_of
from oneword.export.lowering import lower
from oneword.export.source import load_source
from oneword.export.trace import trace


class Shapes(torch.nn.Module):
    """x [B, H, W, 4]: reshapes with one and with several dynamic sizes, those that torch.onnx would decompose."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        b, h, w, c = x.shape
        tokens = x.flatten(1, 2).contiguous().unflatten(2, (2, -1))
        first, second = tokens.reshape(b, h * w, c).to(x.dtype).chunk(2, dim=2)
        mixed = torch.nn.functional.dropout(first, training=False) * second.detach()
        rows = mixed.view(b, h, w, c // 2).flatten(0, 1) + mixed.flatten().reshape(-1, w, 2)
        return rows, x.permute(0, 3, 1, 2).flatten(1)


class Norm(torch.nn.Module):
    def __init__(self, dtype: torch.dtype, eps: float | None, affine: bool) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(8, eps=eps, elementwise_affine=affine, dtype=dtype)
        if affine:
            torch.nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Spread(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.std(dim=1)


def captured(module: torch.nn.Module, x: Tensor, axes: dict[int, object]) -> ExportedProgram:
    return torch.export.export(module.eval(), (x,), dynamic_shapes=(axes,), strict=False)


def is_lowered(program: ExportedProgram) -> bool:
    return program.run_decompositions({}) is program


def test_a_lowered_program_computes_the_same_at_other_sizes() -> None:
    program = captured(Shapes(), torch.randn(3, 5, 6, 4), dict.fromkeys((0, 1, 2), Dim.DYNAMIC))
    lower(program)
    assert is_lowered(program)
    for sizes in ((2, 7, 3, 4), (5, 2, 9, 4)):
        x = torch.randn(sizes)
        assert all(map(torch.equal, program.module()(x), Shapes()(x)))


@pytest.mark.parametrize(("eps", "affine"), [(1e-6, True), (None, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_lowered_rms_norm_computes_the_same(dtype: torch.dtype, eps: float | None, affine: bool) -> None:
    module = Norm(dtype, eps, affine)
    program = captured(module, torch.randn(3, 8, dtype=dtype), {0: Dim.DYNAMIC})
    lower(program)
    assert is_lowered(program)
    x = torch.randn(5, 8, dtype=dtype)
    torch.testing.assert_close(program.module()(x), module(x), rtol=0, atol=1e-6 if dtype == torch.float32 else 4e-3)


def test_a_program_with_another_operator_is_left_to_torch() -> None:
    program = captured(Spread(), torch.randn(3, 8), {0: Dim.DYNAMIC})
    lower(program)
    assert not is_lowered(program)


def test_a_graph_is_not_traced_again(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("traced again")

    monkeypatch.setattr(ExportedProgram, "run_decompositions", refuse)
    text_encoder = family_of(load_source(tiny_model_dir)).graphs[0]
    files, copies = trace(text_encoder, tmp_path)
    assert files
    assert copies
