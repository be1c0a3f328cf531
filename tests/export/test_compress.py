"""Bundles with int8 weights: what is compressed and how, what the backends keep of it, and who refuses it."""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx.reference import ReferenceEvaluator

from benchmarks.psnr import psnr
from oneword.engines import builder
from oneword.engines.errors import EngineError, UsageError
from oneword.engines.graph import DType, Graph, Precision, Provider, TensorSpec, Weights
from oneword.engines.open import Backend, open_engine
from oneword.export.compress import SMALLEST, compress_weights, per_channel
from oneword.export.families import family_of
from oneword.export.parity import Reference, compare, references
from oneword.export.source import load_source
from oneword.export.write import Exported, export_bundle
from oneword.runtime import backends
from oneword.runtime.bundle import Bundle
from oneword.runtime.drawing import draw
from oneword.runtime.model import Model
from oneword.runtime.request import Image
from tests.bundles import export_once
from tests.export.operators import attentions_and_norms, operators_run, random

GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
compressible (float[B, 16, H, W] image, float[B, 32] row) => (float[B, 32, H, W] convolved, float[B, 48] product,
                                                              float[B, 64] gemm, float[B, 32] transposed) {
  squared = Mul(image, image)
  convolved = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (squared, kernel)
  product = MatMul(row, columns)
  gemm = Gemm <transB = 1> (row, rows)
  twice = Gemm <transB = 1> (row, both)
  transposed = MatMul(twice, both)
}
"""
SHAPES = {"kernel": (32, 16, 3, 3), "columns": (32, 48), "rows": (64, 32), "both": (64, 32)}
INPUTS = (TensorSpec("image", DType.FLOAT32, ("B", 16, "H", "W")), TensorSpec("row", DType.FLOAT32, ("B", 32)))
OUTPUTS = (
    TensorSpec("convolved", DType.FLOAT32, ("B", 32, "H", "W")),
    TensorSpec("product", DType.FLOAT32, ("B", 48)),
    TensorSpec("gemm", DType.FLOAT32, ("B", 64)),
    TensorSpec("transposed", DType.FLOAT32, ("B", 32)),
)


@pytest.fixture
def compressed(tmp_path: Path) -> Graph:
    proto = onnx.parser.parse_model(GRAPH)
    for seed, (name, shape) in enumerate(SHAPES.items()):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(random(shape, seed), name))
    traced = onnx_ir.from_proto(proto)
    compress_weights(traced)
    onnx_ir.save(traced, tmp_path / "g.onnx")
    onnx.checker.check_model(tmp_path / "g.onnx", full_check=True)
    return Graph(("g.onnx",), "d", Precision.FP32, INPUTS, OUTPUTS, weights=Weights.INT8)


def weights_of(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def test_a_channels_largest_number_becomes_127_and_the_others_follow() -> None:
    weight = np.array([[1.0, 0.5, -0.25], [-254, 0, 3], [0, 0, 0]], np.float32)
    integers, scales = per_channel(weight, axis=0)
    assert integers.tolist() == [[127, 64, -32], [-127, 0, 2], [0, 0, 0]]  # 63.5, -31.75 and 1.5 are rounded
    np.testing.assert_allclose(scales[:2], [1 / 127, 2], rtol=1e-6)

    integers, scales = per_channel(np.ascontiguousarray(weight.T), axis=1)
    assert integers.T.tolist() == [[127, 64, -32], [-127, 0, 2], [0, 0, 0]]


def test_weights_of_convolutions_and_products_are_compressed_by_output_channel(
    compressed: Graph, tmp_path: Path
) -> None:
    graph, stored = onnx.load(tmp_path / "g.onnx").graph, weights_of(tmp_path / "g.onnx")
    axes = {
        node.input[0]: attribute.i
        for node in graph.node
        for attribute in node.attribute
        if node.op_type == "DequantizeLinear"
    }
    assert axes == {"kernel.int8": 0, "columns.int8": 1, "rows.int8": 0}
    assert stored.keys() == {*axes, "kernel.scale", "columns.scale", "rows.scale", "both"}  # two axes fit no channel
    for seed, (name, shape) in enumerate(SHAPES.items()):
        if name != "both":
            integers, scale = stored[f"{name}.int8"], stored[f"{name}.scale"]
            assert (integers.dtype, integers.shape) == (np.int8, shape)
            along = np.moveaxis(integers * 1.0, axes[f"{name}.int8"], -1) * scale
            error = np.abs(along - np.moveaxis(random(shape, seed), axes[f"{name}.int8"], -1))
            assert (error <= 0.5001 * scale).all()


def test_small_weights_and_other_constants_stay() -> None:
    proto = onnx.parser.parse_model("""
    <ir_version: 10, opset_import: ["" : 20]>
    kept (float[B, 16] x, int64[B] i) => (float[B, 16] y, float[B, 64] z) {
      y = MatMul(x, small)
      z = Gather(table, i)
    }""")
    for name, shape in {"small": (16, 16), "table": (64, 64)}.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(random(shape, 0), name))
    traced = onnx_ir.from_proto(proto)
    compress_weights(traced)
    assert set(traced.graph.initializers) == {"small", "table"}
    assert [node.op_type for node in traced.graph] == ["MatMul", "Gather"]


def feeds() -> dict[str, np.ndarray]:
    return {"image": random((2, 16, 9, 7), 10), "row": random((2, 32), 11)}


def expanded(folder: Path) -> list[Any]:
    """The outputs of the graph by ONNX's own reference, which expands every weight."""
    return ReferenceEvaluator(onnx.load(folder / "g.onnx")).run(None, feeds())


@pytest.mark.parametrize("backend", [Backend.ONNXRUNTIME, Backend.OPENVINO])
def test_only_weights_are_rounded(compressed: Graph, tmp_path: Path, backend: Backend) -> None:
    pytest.importorskip(backend.value)
    if backend is Backend.OPENVINO:
        from oneword.engines.openvino import OpenVinoEngine

        engine: Any = OpenVinoEngine("g", compressed, tmp_path, threads=1, exact=True)
    else:
        engine = open_engine(backend, "g", compressed, tmp_path)
    outputs = engine.run(feeds())
    for spec, expected in zip(OUTPUTS, expanded(tmp_path), strict=True):
        np.testing.assert_allclose(outputs[spec.name], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_onnxruntime_expands_one_weight_at_a_time(
    compressed: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = operators_run("g", compressed, tmp_path, feeds(), monkeypatch)
    assert Counter(ran) == {"Mul": 1, "DequantizeLinear": 3, "Conv": 1, "MatMul": 2, "Gemm": 2}  # not folded, not fused
    after = [operator for before, operator in pairwise(ran) if before == "DequantizeLinear"]
    assert sorted(after) == ["Conv", "Gemm", "MatMul"]  # each weight is used before the next one is expanded


def test_openvino_keeps_the_weights_of_products_compressed_and_those_of_convolutions_expanded(
    compressed: Graph, tmp_path: Path
) -> None:
    openvino = pytest.importorskip("openvino")
    from oneword.engines.openvino_conversion import convert_graph

    core = openvino.Core()
    (tmp_path / "plan").mkdir()
    convert_graph(core, tmp_path / "g.onnx", tmp_path / "plan" / "g.xml")
    plan = core.read_model(tmp_path / "plan" / "g.xml")
    types = {tuple(op.shape): op.get_element_type() for op in plan.get_ops() if op.get_type_name() == "Constant"}
    assert types[SHAPES["columns"]] == types[SHAPES["rows"]] == openvino.Type.i8
    assert types[SHAPES["kernel"]] == openvino.Type.f32  # as any small constant; a large one is halved
    ran = core.compile_model(plan, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"})
    for actual, expected in zip(ran(feeds()).values(), expanded(tmp_path), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    precisions = {
        op.get_rt_info()["outputPrecisions"].astype(str)
        for op in ran.get_runtime_model().get_ops()
        if op.get_rt_info()["layerType"].astype(str) == "Const" and op.get_output_shape(0)[0] in (32, 64)
    }
    assert "i8" in precisions


@pytest.fixture(scope="module")
def exported(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_once(tiny_model_dir, tmp_path_factory.mktemp("int8") / "bundle", weights=Weights.INT8)


@pytest.fixture(scope="module")
def bundle(exported: Exported) -> Bundle:
    return exported.bundle


def test_the_difference_that_int8_weights_make_is_measured_against_the_model_itself(exported: Exported) -> None:
    [denoised] = [difference for difference in exported.differences if difference.output == "denoised"]
    assert 1e-4 < denoised.value < denoised.allowed == 0.1  # fp32's own is below 1e-4


def test_a_graph_that_int8_weights_change_too_much_is_refused(tiny_model_dir: Path, bundle: Bundle) -> None:
    [module] = [graph for graph in family_of(load_source(tiny_model_dir)).graphs if graph.name == "vae_encoder"]
    doubled = [Reference(c.feeds, {**c.outputs, "mean": 2 * c.outputs["mean"]}) for c in references(module)]
    engine = open_engine(Backend.ONNXRUNTIME, "vae_encoder", bundle.graph("vae_encoder"), bundle.path)
    with pytest.raises(EngineError, match=r"vae_encoder\.mean: .* the model: export it without --weights int8"):
        compare(engine, doubled, Precision.FP32, Weights.INT8)


def test_all_graphs_of_a_bundle_have_int8_weights_and_share_them_with_their_copies(
    bundle: Bundle, tiny_bundle: Path
) -> None:
    assert {graph.weights for graph in bundle.manifest.graphs.values()} == {Weights.INT8}
    for graph in bundle.manifest.graphs.values():
        for name in {graph.files[0], *graph.fused.values()}:
            model = onnx.load(bundle.path / name, load_external_data=False)
            large = [tensor for tensor in model.graph.initializer if np.prod(tensor.dims) >= SMALLEST]
            integers = [tensor for tensor in large if tensor.data_type == onnx.TensorProto.INT8]
            assert integers
            assert all(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in integers if graph.fused)
            floats = {tensor.name for tensor in large} - {tensor.name for tensor in integers}
            assert {node.op_type for node in model.graph.node if floats & {*node.input}} <= {"Gather"}
    for provider in Provider:
        assert attentions_and_norms(bundle.path, provider) == attentions_and_norms(tiny_bundle, provider)


def picture(path: Path, engine: Backend) -> Image:
    model = Model.open(path, engine, threads=1)
    [result] = draw(model, "a photo of the red cat", seed=3, steps=8, guidance_scale=5.0)
    return result.image


@pytest.mark.parametrize("engine", [Backend.ONNXRUNTIME, Backend.OPENVINO])
def test_a_bundle_with_int8_weights_draws_nearly_the_same_picture(
    bundle: Bundle, tiny_bundle: Path, engine: Backend
) -> None:
    pytest.importorskip(engine.value)
    assert psnr(picture(bundle.path, engine), picture(tiny_bundle, Backend.ONNXRUNTIME)) >= 30


def test_tensorrt_refuses_int8_weights(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = bundle.graph("vae_encoder")
    for flavour in builder.Flavour:
        with pytest.raises(EngineError, match=f"has int8 weights, which {flavour} does not run: export the model"):
            builder.build_plan("vae_encoder", graph, bundle.path, tmp_path, flavour, "1", "sm89", {})
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda module: object())
    for backend in (Backend.TENSORRT, Backend.TENSORRT_RTX):
        assert next(backends._obstacles(bundle, backend)) == "the bundle has int8 weights, which it does not run"


def test_int8_weights_of_a_half_precision_model_are_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--weights int8 with --precision fp16: int8 weights are for --precision fp32"):
        export_bundle(tiny_model_dir, tmp_path / "b", precision=Precision.FP16, weights=Weights.INT8)
