"""ONNX graphs rewritten for OpenVINO compute what they did."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import helper, numpy_helper
from torch.nn import functional

from oneword.engines.engine import NumpyArray
from oneword.engines.openvino_conversion import (
    convert_graph,
    expand_convolutions,
    halve_products,
    move_upsampling,
    size_of_copies,
    stays_float32,
)
from oneword.runtime.bundle import Bundle

openvino = pytest.importorskip("openvino")

HALVED = 1 + 2.0**-12
"""Rounded by fp16."""


def int8_convolution(
    scaled: Callable[[Any, Any, Any], Any] = lambda ops, integers, scales: ops.multiply(integers, scales),
    reshape: Sequence[int] | None = (8, 1, 1, 1),
    twice: bool = False,
) -> Any:
    """A convolution whose weight [8, 4, 3, 3] is int8; by default as OpenVINO's frontend reads it from ONNX."""
    from openvino import opset13 as ops

    x = ops.parameter([1, 4, 100, 100], np.float32, name="x")
    scales = ops.constant(np.full(8, 0.5, np.float32))
    if reshape is not None:
        scales = ops.reshape(scales, ops.constant(np.array(reshape)), special_zero=False)
    integers = ops.convert(ops.constant(np.full((8, 4, 3, 3), 3, np.int8)), "f32")
    weight = scaled(ops, integers, scales)
    convolved = ops.convolution(x, weight, [1, 1], [1, 1], [1, 1], [1, 1])
    return openvino.Model([convolved, ops.relu(weight)] if twice else [convolved], [x], "convolution")


def test_a_weight_that_openvino_reads_in_an_unknown_way_is_refused_and_left() -> None:
    expand_convolutions(model := int8_convolution())
    [expanded] = [op.data for op in model.get_ops() if op.get_type_name() == "Constant" and op.data.ndim == 4]
    np.testing.assert_array_equal(expanded, np.full((8, 4, 3, 3), 1.5, np.float32))

    unknown = {
        "Subtract": int8_convolution(lambda ops, integers, scales: ops.subtract(integers, scales)),
        "Relu": int8_convolution(lambda ops, integers, scales: ops.relu(integers)),
        "Multiply": int8_convolution(lambda ops, integers, scales: ops.multiply(scales, integers)),
        "Multiply before ['Convolution', 'Relu']": int8_convolution(twice=True),
        "Multiply before ['Convolution']": int8_convolution(
            lambda ops, integers, scales: ops.multiply(integers, ops.constant(np.float32(2))), reshape=None
        ),
        "Multiply ": int8_convolution(
            lambda ops, integers, scales: ops.multiply(integers, ops.relu(scales)), reshape=(8, 1, 1, 1)
        ),
    }
    for node, model in unknown.items():
        before = [op.get_type_name() for op in model.get_ordered_ops()]
        with pytest.raises(RuntimeError, match=rf"reads the int8 weight .* \[8, 4, 3, 3\] as {re.escape(node)}"):
            expand_convolutions(model)
        assert [op.get_type_name() for op in model.get_ordered_ops()] == before


def bytes_of_copies(model: Any, halve: bool = True) -> int:
    return size_of_copies(model, [op for op in model.get_ops() if stays_float32(op, halve)])


def test_converting_takes_the_bytes_of_one_copy_or_of_two_if_constants_are_halved() -> None:
    """A convolution's int8 weights, 8 * 4 * 9 numbers, become 4 bytes each; a product's [300, 300] stay 1 byte."""
    from openvino import opset13 as ops

    model = int8_convolution()
    expand_convolutions(model)
    assert bytes_of_copies(model) == 4 * (8 * 4 * 9)  # small constants are exact

    x = ops.parameter([1, 300], np.float32, name="x")
    integers, scales = ops.constant(np.ones((300, 300), np.int8)), ops.constant(np.ones((1, 300), np.float32))
    product = ops.matmul(x, ops.multiply(ops.convert(integers, "f32"), scales), False, False)
    large = ops.matmul(product, ops.constant(np.full((300, 300), HALVED, np.float32)), False, False)
    model = openvino.Model([large], [x], "products")
    assert bytes_of_copies(model) == 2 * 300 * 300 + 300 * (2 + 4) + 2 * 2 * 300 * 300
    assert bytes_of_copies(model, halve=False) == 300 * 300 + 300 * 4 + 4 * 300 * 300


def onnx_model(
    nodes: Sequence[Any],
    constants: dict[str, NumpyArray],
    x: Sequence[str | int],
    outputs: Sequence[str] = ("y",),
    dtype: type = np.float32,
) -> Any:
    """What OpenVINO reads of an ONNX graph with an input x of this shape."""
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    values = [helper.make_tensor_value_info(name, element, None) for name in outputs]
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    inputs = [helper.make_tensor_value_info("x", element, x)]
    graph = helper.make_graph([*nodes], "graph", inputs, values, initializers)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return openvino.Core().read_model(made.SerializeToString())


def computed(model: Any, x: NumpyArray) -> list[NumpyArray]:
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [np.array(value) for value in compiled({"x": x}).values()]


def kinds(model: Any) -> Counter[str]:
    return Counter(op.get_type_name() for op in model.get_ordered_ops())


def normal(*shape: int, seed: int = 0) -> NumpyArray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def gated(axis: int = -1, bias: NumpyArray | None = None, users: Sequence[str] = ()) -> Any:
    """a * gelu(b), where [a, b] = x @ weights + bias, and further outputs."""
    nodes = [
        helper.make_node("MatMul", ["x", "weights"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["sum"]),
        helper.make_node("Split", ["sum"], ["a", "b"], axis=axis, num_outputs=2),
        helper.make_node("Gelu", ["b"], ["gate"]),
        helper.make_node("Mul", ["a", "gate"], ["y"]),
        *(helper.make_node("Relu", [name], [f"relu {name}"]) for name in users),
    ]
    constants = {"weights": normal(6, 8), "bias": normal(8, seed=1) if bias is None else bias}
    return onnx_model(nodes, constants, ["B", 4, 6], ["y", *(f"relu {name}" for name in users)])


@pytest.mark.parametrize("axis", [-1, 2])
def test_the_halves_of_a_product_are_computed_apart(axis: int) -> None:
    x = normal(3, 4, 6, seed=2)
    halve_products(model := gated(axis))

    a, b = (torch.from_numpy(x) @ torch.from_numpy(normal(6, 8)) + torch.from_numpy(normal(8, seed=1))).chunk(2, -1)
    np.testing.assert_allclose(computed(model, x)[0], a * functional.gelu(b), rtol=1e-5, atol=1e-6)
    assert (kinds(model)["MatMul"], kinds(model)["Split"]) == (2, 0)


@pytest.mark.parametrize(
    "model",
    [
        gated(axis=1),
        gated(users=["product"]),
        gated(users=["sum"]),
        gated(bias=normal(1)),
    ],
)
def test_products_that_are_used_whole_or_have_another_bias_are_not_halved(model: Any) -> None:
    x = normal(3, 4, 6, seed=2)
    before, counts = computed(model, x), kinds(model)
    halve_products(model)

    assert kinds(model) == counts
    for a, b in zip(computed(model, x), before, strict=True):
        np.testing.assert_array_equal(a, b)


def doubled(
    scales: Sequence[float] = (1, 1, 2, 2),
    dtype: type = np.float32,
    kernel: int = 3,
    stride: int = 1,
    users: Sequence[str] = (),
    bias: Sequence[str] = ("bias",),
    sizes: bool = False,
) -> Any:
    """A convolution of an enlarged picture, and further outputs."""
    by_size = ["shape"] if sizes else []
    floor = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    pads = [kernel // 2] * 4
    nodes = [
        helper.make_node("Resize", ["x", "", "" if sizes else "scales", *by_size], ["large"], **floor),
        helper.make_node("Conv", ["large", "weights", *bias], ["y"], pads=pads, strides=[stride] * 2),
        *(helper.make_node("Relu", [name], [f"relu {name}"]) for name in users),
    ]
    weights = {"weights": normal(5, 4, kernel, kernel), **{name: normal(5, seed=1) for name in bias}}
    constants = {name: value.astype(dtype) for name, value in weights.items()}
    constants["shape" if sizes else "scales"] = np.array([2, 4, 6, 10]) if sizes else np.array(scales, np.float32)
    return onnx_model(nodes, constants, ["B", 4, "h", "w"], ["y", *(f"relu {name}" for name in users)], dtype)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8)])
def test_a_convolution_of_a_doubled_picture_is_computed_from_the_picture(size: tuple[int, int]) -> None:
    x = normal(2, 4, *size, seed=2)
    move_upsampling(model := doubled())

    large = functional.interpolate(torch.from_numpy(x), scale_factor=2, mode="nearest")
    weights, bias = torch.from_numpy(normal(5, 4, 3, 3)), torch.from_numpy(normal(5, seed=1))
    expected = functional.conv2d(large, weights, bias, padding=1)
    np.testing.assert_allclose(computed(model, x)[0], expected, rtol=1e-4, atol=1e-5)
    assert (kinds(model)["Convolution"], kinds(model)["Interpolate"]) == (4, 0)


@pytest.mark.parametrize(
    "model",
    [
        doubled(scales=(1, 1, 3, 2)),
        doubled(dtype=np.float16),
        doubled(kernel=1),
        doubled(stride=2),
        doubled(users=["large"]),
        doubled(bias=()),
        doubled(sizes=True),
    ],
)
def test_other_convolutions_of_enlarged_pictures_stay(model: Any) -> None:
    x = normal(2, 4, 3, 5, seed=2).astype(model.input(0).get_element_type().to_dtype())
    before, counts = computed(model, x), kinds(model)
    move_upsampling(model)

    assert kinds(model) == counts
    for a, b in zip(computed(model, x), before, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("halve", [True, False])
def test_a_models_graphs_are_rewritten_and_compute_what_they_did(
    tiny_bundle: Path, tmp_path: Path, halve: bool
) -> None:
    bundle, core = Bundle.open(tiny_bundle), openvino.Core()
    paths = {name: bundle.file(bundle.graph(name).files[0]) for name in ("denoise_step", "vae_decoder")}
    for name, path in paths.items():
        convert_graph(core, path, tmp_path / f"{name}.xml", halve=halve)

    step = kinds(core.read_model(tmp_path / "denoise_step.xml"))
    assert step["Gelu"] == kinds(core.read_model(paths["denoise_step"]))["Gelu"] > 0
    assert step["Split"] == 0
    decoder, original = (core.read_model(path) for path in (tmp_path / "vae_decoder.xml", paths["vae_decoder"]))
    assert kinds(decoder)["DepthToSpace"] == kinds(original)["Interpolate"] > 0
    assert kinds(decoder)["Interpolate"] == 0
    latents = normal(2, 4, 7, 5)
    a, b = (
        core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})({"latents": latents})["images"]
        for model in (decoder, original)
    )
    assert np.abs(a.astype(int) - b).max() <= 1
