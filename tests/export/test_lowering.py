"""Lowered programs compute what their modules do, and are not traced again."""

import contextlib
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from onnxscript.rewriter import _DEFAULT_REWRITE_RULES
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.onnx._internal.exporter._registration import ONNXRegistry

from oneword.export.families import family_of
from oneword.export.lowering import CONVERTED, known_values, lower
from oneword.export.source import load_source
from oneword.export.trace import BF16_OPSET, OPSET, trace


class Shapes(torch.nn.Module):
    """x [B, H, W, 4]: what is replaced or removed, with one and with several dynamic sizes."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        b, h, w, c = x.shape
        tokens = x.flatten(1, 2).contiguous().unflatten(2, (2, -1))
        first, second = tokens.reshape(b, h * w, c).to(x.dtype).chunk(2, dim=2)
        mixed = torch.nn.functional.dropout(first, training=False) * second.detach()
        rows = mixed.view(b, h, w, c // 2).flatten(0, 1) + mixed.flatten().reshape(-1, w, 2)
        positive = ((1 - x > 0) & (x > 0)).to(torch.float16)
        return rows, x.permute(0, 3, 1, 2).flatten(1), positive, x.contiguous()


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


class Dropped(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.dropout(x, training=True)


class MixedTypes(torch.nn.Module):
    """x [B, T] float16: operands of different types, of numbers, and sizes as numbers."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        places = torch.arange(x.shape[1])
        return x / 8 + places, places * 0.5, places.float() / x.shape[0], (x**2 > 0) * x.float(), x.clamp(0, 1) - 1


class Nested(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return x.to(torch.float64)


def captured(module: torch.nn.Module, x: Tensor, axes: dict[int, object]) -> ExportedProgram:
    return torch.export.export(module.eval(), (x,), dynamic_shapes=(axes,), strict=False)


def is_lowered(program: ExportedProgram) -> bool:
    return program.run_decompositions({}) is program


def test_a_lowered_program_computes_the_same_at_other_sizes() -> None:
    program = captured(Shapes(), torch.randn(3, 5, 6, 4), dict.fromkeys((0, 1, 2), Dim.DYNAMIC))
    assert lower(program)
    assert is_lowered(program)
    for sizes in ((2, 7, 3, 4), (5, 2, 9, 4)):
        x = torch.randn(sizes)
        assert all(map(torch.equal, program.module()(x), Shapes()(x)))


@pytest.mark.parametrize(("eps", "affine"), [(1e-6, True), (None, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-2, 300])
def test_a_lowered_rms_norm_computes_the_same(
    scale: float, dtype: torch.dtype, eps: float | None, affine: bool
) -> None:
    """Also where the square of a number is beyond the range of float16, or smaller than its precision."""
    module = Norm(dtype, eps, affine)
    program = captured(module, torch.randn(3, 8, dtype=dtype), {0: Dim.DYNAMIC})
    assert lower(program)
    x = scale * torch.randn(5, 8, dtype=dtype)
    rounding = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(program.module()(x), module(x), rtol=rounding, atol=0)


@pytest.mark.parametrize("module", [Spread(), Dropped(), Nested()])
def test_a_program_with_another_operator_is_left_to_torch(module: torch.nn.Module) -> None:
    program = captured(module, torch.randn(3, 8), {0: Dim.DYNAMIC})
    assert not lower(program)
    assert not is_lowered(program)


def test_every_operator_that_is_not_replaced_has_a_conversion() -> None:
    for opset in (OPSET, BF16_OPSET):
        registry = ONNXRegistry.from_torchlib(opset)
        assert [name for name in CONVERTED if not registry.is_registered(attrgetter(name)(torch.ops))] == []


@pytest.mark.parametrize("lowered", [False, True])
def test_types_are_promoted_as_torch_onnx_promotes_them(lowered: bool) -> None:
    graphs = []
    for context in (contextlib.nullcontext, known_values):
        program = captured(MixedTypes(), torch.ones(2, 3, dtype=torch.float16), {0: Dim.DYNAMIC, 1: Dim.DYNAMIC})
        if lowered:
            assert lower(program)
        with context():
            converted = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False)
        assert converted is not None
        graphs.append([(node.op_type, [str(v.type) for v in node.outputs]) for node in converted.model.graph])
    assert graphs[0] == graphs[1]
    assert [kind for kind, _ in graphs[0]].count("Cast") >= 4


def test_one_rule_of_torch_onnx_is_left_out() -> None:
    assert sum(rule.name == "SlicesSplit" for rule in _DEFAULT_REWRITE_RULES) == 1


def test_a_graph_is_not_traced_again(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("traced again")

    monkeypatch.setattr(ExportedProgram, "run_decompositions", refuse)
    text_encoder = family_of(load_source(tiny_model_dir)).graphs[0]
    files, copies = trace(text_encoder, tmp_path)
    assert files
    assert copies
