"""Traces a torch module to checked ONNX files: opset 20 (bf16: 22), batch and size axes dynamic and named."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import torch

from oneword.engines.engine import NumpyArray, numpy_dtype
from oneword.engines.errors import OnewordError, one_line
from oneword.engines.graph import DType, Precision, Provider, TensorSpec, Weights
from oneword.export.compress import compress_weights
from oneword.export.eager import to_torch
from oneword.export.families import Traceable
from oneword.export.fusion import fused_copies, save_copy
from oneword.export.lowering import known_values, lower
from oneword.export.optimization import optimize

OPSET = 20
BF16_OPSET = 22  # the first whose Conv takes bfloat16
EXAMPLE_SIZES = {"B": 3, "N": 5, "M": 4, "T": 7, "h": 12, "w": 10}  # none is 0 or 1, and all differ


def trace(
    graph: Traceable, folder: Path, weights: Weights = Weights.FLOAT
) -> tuple[tuple[str, ...], dict[Provider, str]]:
    """Writes `<name>.onnx`, its data file and its fused copies into `folder`.

    Returns the graph's files, the .onnx first, and the copies by provider. A graph without copies has a data file only
    if it has a GiB of weights. There are no copies in bf16, for which ONNX Runtime has no kernels of its own.
    """
    path = folder / f"{graph.name}.onnx"
    data = path.with_name(f"{path.name}.data")
    try:
        with quiet(), torch.no_grad():
            traced = converted(graph)
            if weights is Weights.INT8:
                compress_weights(traced)
            copies = {} if graph.precision is Precision.BF16 else fused_copies(traced)
            for model in (traced, *copies.values()):
                name_axes(model, graph)
            onnx_ir.save(traced, path, external_data=data.name if large(graph) or copies else None)
            copy_paths = {provider: path.with_suffix(f".{provider}.onnx") for provider in copies}
            for provider, model in copies.items():
                save_copy(model, copy_paths[provider], path)
        for written in (path, *copy_paths.values()):
            onnx.checker.check_model(str(written), full_check=not large(graph))
    except (
        RuntimeError,
        ValueError,
        TypeError,
        AssertionError,
        onnx.checker.ValidationError,
        onnx.shape_inference.InferenceError,
    ) as e:
        raise OnewordError(f"{graph.name} cannot be traced to ONNX ({one_line(e)}): this model is not supported") from e
    files = tuple(p.name for p in (path, data) if p.exists())
    return files, {provider: copy_path.name for provider, copy_path in copy_paths.items()}


def converted(graph: Traceable) -> onnx_ir.Model:
    """The module as an optimized ONNX model, whose values still have their shapes."""
    examples = to_torch(graph.inputs, example_feeds(graph, EXAMPLE_SIZES, seed=0))
    # Captured here, because torch.onnx would fall back to a capture that takes five times as long.
    captured = torch.export.export(graph.module, (), examples, dynamic_shapes=dynamic_axes(graph), strict=False)
    lower(captured)
    with known_values():
        program = torch.onnx.export(
            captured,
            dynamo=True,
            opset_version=BF16_OPSET if graph.precision is Precision.BF16 else OPSET,
            input_names=[spec.name for spec in graph.inputs],
            output_names=[spec.name for spec in graph.outputs],
            optimize=False,
            verbose=False,
        )
    assert program is not None  # always set with dynamo=True
    optimize(program.model)
    return program.model


def large(graph: Traceable) -> bool:
    """Whether the weights go to a data file, which protobuf requires above 2 GB."""
    tensors = (*graph.module.parameters(), *graph.module.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) > 1 << 30


def dynamic_axes(graph: Traceable) -> dict[str, dict[int, object]]:
    """The axes of every input for torch.export: named axes are dynamic, h and w in multiples of the patch."""
    axes: dict[str, object] = {}
    if (patch := graph.limits.get("patch", 1)) > 1:
        axes = {axis: patch * torch.export.Dim(f"{axis}_patches", max=1 << 12) for axis in ("h", "w")}
    return {
        spec.name: {
            i: axes.get(axis, torch.export.Dim.DYNAMIC) if isinstance(axis, str) else torch.export.Dim.STATIC
            for i, axis in enumerate(spec.axes)
        }
        for spec in graph.inputs
    }


def name_axes(model: onnx_ir.Model, graph: Traceable) -> None:
    """Gives the axes of inputs and outputs the manifest's names in place of those torch.export invents."""
    for values, specs in ((model.graph.inputs, graph.inputs), (model.graph.outputs, graph.outputs)):
        for value, spec in zip(values, specs, strict=True):
            value.shape = onnx_ir.Shape(spec.axes)
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None  # uses the invented names; every reader infers shapes again


def example_feeds(graph: Traceable, sizes: Mapping[str, int], seed: int) -> dict[str, NumpyArray]:
    """Random inputs at the given sizes of the axes (H and W are h and w times the VAE's factor; h and w are
    rounded up to the network's patch), every index valid."""
    generator = np.random.default_rng(seed)
    factor, patch = graph.limits.get("factor", 1), graph.limits.get("patch", 1)
    h, w = (-(-sizes[axis] // patch) * patch for axis in ("h", "w"))
    axes = {**sizes, "h": h, "w": w, "H": h * factor, "W": w * factor, "V": graph.limits.get("V", 0) + 3}
    axes["T"] = min(axes["T"], graph.limits.get("T", axes["T"]))
    return {spec.name: example(spec, axes, graph.limits, generator) for spec in graph.inputs}


INDEXED_AXIS = {
    "input_ids": "V",
    "eos_index": "T",
    "branch_row": "B",
    "branch_context": "M",
    "branch_pooled": "M",
    "uncond_branch": "N",
    "cond_branch": "N",
}


def example(
    spec: TensorSpec, axes: Mapping[str, int], limits: Mapping[str, int], generator: np.random.Generator
) -> NumpyArray:
    """A random array for one input: valid indices, timesteps 0..999, everything else of order 1."""
    shape = tuple(axes[axis] if isinstance(axis, str) else axis for axis in spec.axes)
    if spec.name == "layer":
        return generator.integers(1, limits["layer"], shape)
    if spec.dtype is DType.INT64:
        return generator.integers(0, axes[INDEXED_AXIS[spec.name]], shape)
    if spec.dtype is DType.UINT8:
        return generator.integers(0, 256, shape, dtype=np.uint8)
    values = generator.standard_normal(shape, dtype=np.float32)
    match spec.name:
        case "schedule":
            values[:, 0] = generator.uniform(0, 999, shape[0])
        case "mask":
            values = generator.uniform(0, 1, shape).astype(np.float32)
        case "context_mask":
            values = generator.integers(0, 2, shape).astype(np.float32)
        case "token_weights":
            values = generator.choice(np.array([1, 1, 0.8, 1.2], np.float32), shape)
        case "time_ids":
            values = generator.choice(np.array([0, 512, 1024], np.float32), shape)
        case "embedding_table":
            values *= np.float32(0.02)
    return values.astype(numpy_dtype(spec.dtype))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences torch.onnx's output; exceptions still propagate."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
