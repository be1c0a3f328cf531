"""Weights as 8-bit integers with one scale per output channel, by ONNX Runtime's quantization tools.

A compressed weight is an int8 constant and ONNX's DequantizeLinear in front of the convolutions and matrix products
that use it. Activations, biases, norms and embedding tables stay as they are, and so does the arithmetic. Not covered:
4 bits, groups of weights, and calibration with data.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir

from oneword.engines.onnxruntime import load_onnxruntime

SMALLEST = 1 << 10
"""Weights of fewer numbers are not compressed."""


def compress_weights(model: onnx_ir.Model) -> None:
    """Compresses the float32 weights of a traced model in place. Raises MissingPackage without ONNX Runtime."""
    graph = model.graph
    for name, weight in list(graph.initializers.items()):
        tensor, axis = weight.const_value, output_axis(weight)
        if tensor is None or axis is None or tensor.dtype != onnx_ir.DataType.FLOAT or tensor.size < SMALLEST:
            continue
        integers, scales = per_channel(tensor.numpy(), axis)
        inputs = [_constant(f"{name}.int8", integers), _constant(f"{name}.scale", scales)]
        for value in inputs:
            graph.register_initializer(value)
        node = onnx_ir.node("DequantizeLinear", inputs, attributes={"axis": axis}, name=f"{name}.dequantized")
        [output] = node.outputs
        output.name, output.type, output.shape = f"{name}.float", weight.type, weight.shape
        weight.replace_all_uses_with(output)
        graph.insert_before(graph[0], node)
        del graph.initializers[name]


def _constant(name: str, array: npt.NDArray[Any]) -> onnx_ir.Value:
    tensor = onnx_ir.tensor(array, name=name)
    kind, shape = onnx_ir.TensorType(tensor.dtype), onnx_ir.Shape(array.shape)
    return onnx_ir.Value(name=name, shape=shape, type=kind, const_value=tensor)


def output_axis(weight: onnx_ir.Value) -> int | None:
    """The axis of a weight's output channels; None if its uses differ in it, or one is no convolution or product."""
    axes = {_output_axis(node, place, weight) for node, place in weight.uses()}
    return axes.pop() if len(axes) == 1 else None


def _output_axis(node: onnx_ir.Node, place: int, weight: onnx_ir.Value) -> int | None:
    match node.domain, node.op_type, place:
        case "", "Conv", 1:
            return 0
        case "", "MatMul", 1 if weight.shape is not None and weight.shape.rank() == 2:
            return 1
        case "", "Gemm", 1:
            return 0 if node.attributes.get_int("transB", 0) else 1
    return None


def per_channel(weight: npt.NDArray[np.float32], axis: int) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Integers in -127..127 of a weight's shape, and scales [channels]: the weight is about integers * scale."""
    load_onnxruntime()
    from onnxruntime.quantization.quant_utils import quantize_data

    by_channel = np.moveaxis(weight, axis, 0)
    integers, scales = np.empty(by_channel.shape, np.int8), np.empty(len(by_channel), np.float32)
    for i, numbers in enumerate(by_channel):
        *_, scales[i], integers[i] = quantize_data(numbers, onnx_ir.DataType.INT8, symmetric=True)
    return np.ascontiguousarray(np.moveaxis(integers, 0, axis)), scales
