"""The roof: how fast a step could be if only its products took time.

    python -m benchmarks.roof BUNDLE --size 512    the arithmetic of a guided step, this machine's peaks, their quotient

Peaks are measured through the libraries that run the steps: a product of square matrices in OpenVINO (bfloat16 if the
processor has it, and float32) and in ONNX Runtime (float32), and a copy of 256 MiB in OpenVINO. The fastest of several
runs counts. Arithmetic means that of convolutions and matrix products; the bytes are their inputs, weights and outputs.
Everything else in a step (normalisation, softmax, the sampler) is not counted. The roof is the arithmetic's: caches
keep part of the bytes from memory, all of them in a small model. Ends in one line of JSON.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import lcm, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.openvino_cpu import precision_of, settings

if TYPE_CHECKING:
    from oneword.runtime.bundle import Manifest

_SIDE = 2048  # of the matrices: 17 GFLOP, on 48 MiB in float32
_COPIED = 1 << 26  # numbers of float32
_RUNS = 8
WIDTH = {"bf16": 2, "f32": 4}
"""Bytes of a number."""
LONG = {"bf16": "bfloat16", "f32": "float32"}


@dataclass(frozen=True)
class Work:
    """The arithmetic of one run of a graph."""

    flops: int
    """Of products; a multiplication with its addition counts as two."""
    numbers: int
    """Numbers that the products read and write, each once per product."""


def work_of(graph: Path, shapes: Mapping[str, list[int]]) -> Work:
    """Counts an ONNX graph at these shapes of its inputs, which OpenVINO infers all others from."""
    import openvino

    model = openvino.Core().read_model(graph)
    model.reshape(shapes)
    flops = numbers = 0
    for op in model.get_ops():
        kind = op.get_type_name()
        if kind not in ("MatMul", "Convolution", "GroupConvolution"):
            continue
        first, second = (list(op.get_input_shape(i)) for i in range(2))
        out = list(op.get_output_shape(0))
        if kind == "MatMul":
            terms = first[-2 if op.get_attributes()["transpose_a"] else -1]
        else:  # weights are [C_out, C_in, k, k], after the groups if there are any
            terms = prod(second[-3:])
        flops += 2 * prod(out) * terms
        numbers += prod(first) + prod(second) + prod(out)
    return Work(flops, numbers)


def step_of(bundle: Path, size: int) -> Work:
    """One guided step of one picture of size x size pixels, with prompts of one chunk."""
    from oneword.runtime.bundle import Bundle

    opened = Bundle.open(bundle)
    shapes = {name: list(shape) for name, shape in step_shapes(opened.manifest, size).items()}
    return work_of(bundle / opened.graph("denoise_step").files[0], shapes)


def step_shapes(manifest: "Manifest", size: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the inputs of a guided step of one picture of size x size pixels, with prompts of one chunk."""
    from oneword.engines.engine import shape_of

    conditioning, side = manifest.conditioning, size // manifest.vae.factor
    blocks = [[manifest.encoder(name).length for name in block] for block in conditioning.context]
    tokens = conditioning.zero_tokens + sum(lcm(*lengths) for lengths in blocks)
    sizes = {"B": 1, "N": 2, "M": 2, "T": tokens, "h": side, "w": side}
    return {spec.name: shape_of("denoise_step", spec, sizes) for spec in manifest.graphs["denoise_step"].inputs}


def peaks(threads: int) -> dict[str, float]:
    """FLOP/s in `bf16` (if the processor has it) and `f32`, and bytes per second of `memory`, read and written."""
    import openvino

    core = openvino.Core()
    flops = 2 * _SIDE**3
    matrix = np.full((_SIDE, _SIDE), 1e-3, np.float32)
    precisions = {precision_of(core), "f32"}
    found = {name: flops / _fastest(_openvino_product(core, matrix, name, threads)) for name in precisions}
    found["f32"] = max(found["f32"], flops / _fastest(_onnxruntime_product(matrix, threads)))
    return {**found, "memory": 2 * 4 * _COPIED / _fastest(_openvino_copy(core, threads))}


def floors(work: Work, found: Mapping[str, float]) -> dict[str, float]:
    """Seconds that the arithmetic takes at least on a machine with these peaks, by number format."""
    return {name: work.flops / found[name] for name in WIDTH if name in found}


def described(work: Work, found: Mapping[str, float]) -> str:
    """The arithmetic and the bytes of a step, and the peaks of the machine, in words."""
    names = [name for name in WIDTH if name in found]
    amount = f"{work.flops / 1e12:.4g} TFLOP" if work.flops >= 1e11 else f"{work.flops / 1e9:.4g} GFLOP"
    size = ", ".join(f"{WIDTH[name] * work.numbers / 1e9:.3g} GB in {LONG[name]}" for name in names)
    speed = ", ".join(f"{found[name] / 1e9:.0f} GFLOP/s in {LONG[name]}" for name in names)
    return (
        f"The products of a guided step are {amount}; without caches they move {size}. "
        f"Measured peaks: {speed}, {found['memory'] / 1e9:.1f} GB/s of memory"
    )


def _openvino_product(core: Any, matrix: np.ndarray, precision: str, threads: int) -> Callable[[], object]:
    from openvino import Model, opset13

    x = opset13.parameter(list(matrix.shape), np.float32)
    return _compiled(core, Model([opset13.matmul(x, opset13.constant(matrix), False, False)], [x]), precision, threads)


def _openvino_copy(core: Any, threads: int) -> Callable[[], object]:
    from openvino import Model, opset13

    x = opset13.parameter([_COPIED], np.float32)
    return _compiled(core, Model([opset13.negative(x)], [x]), "f32", threads)


def _compiled(core: Any, model: Any, precision: str, threads: int) -> Callable[[], object]:
    request = core.compile_model(model, "CPU", settings(precision, threads)).create_infer_request()
    request.get_input_tensor().data[...] = 1e-3
    run: Callable[[], object] = request.infer
    return run


def _onnxruntime_product(matrix: np.ndarray, threads: int) -> Callable[[], object]:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, matrix.shape) for name in "xy"]
    weights = numpy_helper.from_array(matrix, "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", values[:1], values[1:], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": matrix})


def _fastest(run: Callable[[], object]) -> float:
    """Seconds of the fastest of several runs, after a warm-up."""
    run()
    seconds = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    """Prints the arithmetic, the peaks and the floor of a step; ends in one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    work, found = step_of(options.bundle, options.size), peaks(options.threads)
    print(f"At {options.size}x{options.size}: {described(work, found)}")
    seconds = floors(work, found)
    for name, value in seconds.items():
        memory = WIDTH[name] * work.numbers / found["memory"]
        print(
            f"a step in {name}: arithmetic at least {1e3 * value:.1f} ms, memory {1e3 * memory:.1f} ms without caches"
        )
    print(json.dumps({"flops": work.flops, "numbers": work.numbers, "peaks": found, "floors": seconds}))


if __name__ == "__main__":
    main()
