"""Writes ONNX graphs in OpenVINO's own format: with weights in fp16, and with two kinds of layers rewritten so that
OpenVINO computes or copies less. Not covered: when a graph is converted, and how it is compiled
(`oneword.engines.openvino`).
"""

import itertools
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from oneword.engines.engine import NumpyArray
from oneword.engines.errors import FileError, not_imported

_MOST_FLOAT32 = 1 << 16  # numbers of a constant that stays in float32 when weights are halved
_HALF_RANGE = (2.0**-14, 65504.0)  # smallest normal and largest number of fp16


def convert_graph(core: Any, path: Path, xml: Path, *, halve: bool = True) -> None:
    """Writes an ONNX graph in OpenVINO's own format: `xml` and a .bin file.

    With `halve` weights are rounded to fp16, else they are in fp16 only if that is exact. Small constants stay in
    float32: among them are the frequencies of the time embedding, whose product with a timestep of 999 would be wrong
    by 0.2 radians. So do those whose largest number fp16 cannot represent.

    Raises:
        FileError: the disk has no room for the copies that are there for a while; nothing is written.
        RuntimeError: OpenVINO's, or OpenVINO reads int8 weights as other nodes than expected.
    """
    ov = load_openvino()
    model = core.read_model(path)
    expand_convolutions(model)
    halve_products(model)
    move_upsampling(model)
    unhalved = {op.get_friendly_name(): op for op in model.get_ops() if stays_float32(op, halve)}
    if (free := shutil.disk_usage(xml.parent).free) < (size := size_of_copies(model, unhalved.values())):
        raise FileError(f"{xml.parent.parent} has {free >> 20} MiB free, converting takes {size >> 20} MiB")
    if _halved_bytes(model, unhalved.values()):
        all_halved = xml.with_name("halved.xml")
        ov.save_model(model, all_halved, compress_to_fp16=True)
        model = core.read_model(all_halved)
        for op in model.get_ops():  # a halved constant is followed by a conversion that has its name
            if op.get_type_name() == "Convert" and op.get_friendly_name() in unhalved:
                op.output(0).replace(unhalved[op.get_friendly_name()].output(0))
    ov.serialize(model, xml)
    core.read_model(xml)  # raises if the disk was full


def size_of_copies(model: Any, unhalved: Iterable[Any]) -> int:
    """Bytes that converting writes. Without halved constants, those of all constants; else those of a graph with all
    float32 constants halved, and again with those of `unhalved` whole."""
    total: int = sum(op.get_byte_size() for op in _constants(model))
    halved = _halved_bytes(model, unhalved)
    if not halved:
        return total
    return total - _halved_bytes(model, ()) // 2 + total - halved // 2


def _halved_bytes(model: Any, unhalved: Iterable[Any]) -> int:
    """Bytes of the float32 constants that are not in `unhalved`."""
    floats = [op for op in _constants(model) if op.get_element_type() == load_openvino().Type.f32]
    size: int = sum(op.get_byte_size() for op in floats) - sum(op.get_byte_size() for op in unhalved)
    return size


def _constants(model: Any) -> list[Any]:
    return [op for op in model.get_ops() if op.get_type_name() == "Constant"]


def expand_convolutions(model: Any) -> None:
    """Turns the int8 weights of convolutions, which have more than two axes, into float32; those of matrix products
    stay int8. Raises RuntimeError, with the graph half expanded, if a weight is not what OpenVINO makes of ONNX's.

    OpenVINO computes convolutions with expanded weights, and would expand all of them before it compiles the first.
    """
    ov = load_openvino()
    for op in model.get_ops():
        if op.get_type_name() != "Convert" or op.get_input_element_type(0) != ov.Type.i8:
            continue
        weight = op.input_value(0).get_node()
        if weight.get_type_name() != "Constant" or weight.data.ndim <= 2:
            continue
        for product in _users(op):
            expanded = ov.op.Constant(weight.data * _channel_scales(product, op.output(0)))
            expanded.set_friendly_name(product.get_friendly_name())
            product.output(0).replace(expanded.output(0))


def halve_products(model: Any) -> None:
    """Computes the two halves of a product of floats apart, each with half of the weights, where only they are used, as
    in gated GELUs. OpenVINO would copy the whole product to halve it.
    """
    ops = load_openvino().opset13
    for split in model.get_ops():
        if split.get_type_name() != "Split" or split.get_output_size() != 2:
            continue
        add, rank = split.input_value(0).get_node(), len(split.get_input_partial_shape(0))
        if add.get_type_name() != "Add" or _numbers(split.input_value(1)) not in (-1, rank - 1):
            continue
        product, bias = add.input_value(0).get_node(), _numbers(add.input_value(1))
        if product.get_type_name() != "MatMul" or bias is None or len(_users(add)) > 1 or len(_users(product)) > 1:
            continue
        x, weights, form = product.input_value(0), _numbers(product.input_value(1)), product.get_attributes()
        if weights is None or bias.shape != weights.shape[-1:] or form["transpose_a"] or form["transpose_b"]:
            continue
        pairs = zip(np.split(weights, 2, -1), np.split(bias, 2, -1), split.outputs(), strict=True)
        for half_weights, half_bias, output in pairs:
            half = ops.add(ops.matmul(x, ops.constant(half_weights), False, False), ops.constant(half_bias))
            output.replace(half.output(0))


def move_upsampling(model: Any) -> None:
    """Computes convolutions of pictures whose sides were doubled by repeating pixels from the smaller pictures, where
    only they use the larger ones. A 3x3 kernel then covers 2x2 different pixels, in one of four ways: four kernels,
    whose numbers are sums of the original's, take 4/9 of the arithmetic. In exact arithmetic the result is the same.
    """
    ops = load_openvino().opset13
    for doubling in model.get_ops():
        if not _doubles_sides(doubling) or [op.get_type_name() for op in _users(doubling)] != ["Convolution"]:
            continue
        [convolution] = _users(doubling)
        weights, form = _numbers(convolution.input_value(1)), convolution.get_attributes()
        pads = [form[name] for name in ("strides", "dilations", "pads_begin", "pads_end")]
        adds = [op for op in _users(convolution) if op.get_type_name() == "Add"]
        bias = _numbers(adds[0].input_value(1)) if len(adds) == 1 else None
        if weights is None or bias is None or weights.shape[2:] != (3, 3) or pads != [[1, 1]] * 4:
            continue
        if weights.dtype != np.float32:  # a sum would be rounded to fp16
            continue
        quarters = []
        for bottom, right in itertools.product((0, 1), (0, 1)):
            kernel = ops.constant(_summed(_summed(weights, 2, bottom), 3, right))
            begin, end = [1 - bottom, 1 - right], [bottom, right]
            quarter = ops.convolution(doubling.input_value(0), kernel, [1, 1], begin, end, [1, 1])
            quarters.append(ops.add(quarter, ops.constant(bias.reshape(1, -1, 1, 1))))
        interleaved = ops.depth_to_space(ops.concat(quarters, 1), "blocks_first", 2)
        adds[0].output(0).replace(interleaved.output(0))


def _doubles_sides(op: Any) -> bool:
    if op.get_type_name() != "Interpolate":
        return False
    form = op.get_attributes()
    names = ("mode", "coordinate_transformation_mode", "nearest_mode", "shape_calculation_mode")
    scales = _numbers(op.input_value(1))
    nearest = [form[name] for name in names] == ["nearest", "asymmetric", "floor", "scales"]
    return nearest and scales is not None and scales.tolist() == [1, 1, 2, 2]


def _summed(kernel: NumpyArray, axis: int, second: int) -> NumpyArray:
    """The kernel with two numbers instead of three along an axis, for the first or second of each two equal pixels."""
    first, middle, last = np.split(kernel, 3, axis)
    return np.concatenate([first + middle, last] if second else [first, middle + last], axis)


def _channel_scales(product: Any, integers: Any) -> NumpyArray:
    """[C, 1, 1, ...], where `product` is the weight of a convolution: `integers` [C, ...] times reshaped scales [C]."""
    channels, *kernel = integers.get_shape()
    shape = (channels, *(1 for _ in kernel))
    users = {user.get_type_name() for user in _users(product)}
    if product.get_type_name() == "Multiply" and product.input_value(0) == integers and users == {"Convolution"}:
        reshape = product.input_value(1)
        if reshape.get_node().get_type_name() == "Reshape" and reshape.partial_shape == load_openvino().PartialShape(
            shape
        ):
            scales = reshape.get_node().input_value(0).get_node()
            if scales.get_type_name() == "Constant":
                reshaped: NumpyArray = scales.data.reshape(shape)
                return reshaped
    raise RuntimeError(
        f"OpenVINO reads the int8 weight {product.get_friendly_name()!r} {list(integers.get_shape())} as "
        f"{product.get_type_name()} before {sorted(users)}, not Multiply by reshaped scales before Convolution: "
        "install another release of OpenVINO"
    )


def _numbers(value: Any) -> NumpyArray | None:
    """Those of a constant, or of a constant that is reshaped, as it was; None for other values."""
    op = value.get_node()
    if op.get_type_name() == "Reshape":
        op = op.input_value(0).get_node()
    return op.data if op.get_type_name() == "Constant" else None


def _users(op: Any) -> list[Any]:
    return [target.get_node() for output in op.outputs() for target in output.get_target_inputs()]


def stays_float32(op: Any, halve: bool = True) -> bool:
    """Whether a constant stays in float32. Without `halve`, one that fp16 would change does."""
    if op.get_type_name() != "Constant" or op.get_element_type() != load_openvino().Type.f32:
        return False
    if op.data.size <= _MOST_FLOAT32:
        return True
    if not halve:
        with np.errstate(over="ignore"):
            return not np.array_equal(op.data.astype(np.float16), op.data)
    least, most = _HALF_RANGE
    return not least <= max(op.data.max(), -op.data.min()) <= most


def load_openvino() -> Any:
    """The package. Raises MissingPackage."""
    try:
        import openvino
    except ImportError as error:
        raise not_imported("openvino", "openvino", error) from error
    return openvino
