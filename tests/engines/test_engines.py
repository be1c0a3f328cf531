"""A small graph, y = x + table[ids] + bias, through every back end of the CPU."""

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from oneword.engines.engine import Engine
from oneword.engines.errors import EngineError, FeedError, MissingPackage
from oneword.engines.graph import DType, Precision, TensorSpec
from oneword.engines.onnxruntime import OnnxRuntimeEngine
from oneword.engines.openvino import OpenVinoEngine

INPUTS = (
    TensorSpec("x", DType.FLOAT32, ("B", 4)),
    TensorSpec("table", DType.FLOAT32, ("V", 4)),
    TensorSpec("ids", DType.INT64, ("B",)),
    TensorSpec("bias", DType.FLOAT32, ("B", 4), optional=True),
)
OUTPUTS = (TensorSpec("y", DType.FLOAT32, ("B", 4)),)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"], axis=0),
        helper.make_node("Add", ["x", "rows"], ["sum"]),
        helper.make_node("Add", ["sum", "bias"], ["y"]),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 4]),
        helper.make_tensor_value_info("table", TensorProto.FLOAT, ["V", 4]),
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["B"]),
        helper.make_tensor_value_info("bias", TensorProto.FLOAT, ["B", 4]),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", 4])]
    model = helper.make_model(
        helper.make_graph(nodes, "lookup", inputs, outputs), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    path = tmp_path_factory.mktemp("lookup") / "lookup.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def engine(path: Path, request: pytest.FixtureRequest) -> Engine:
    pytest.importorskip(request.param)
    kind = {"onnxruntime": OnnxRuntimeEngine, "openvino": OpenVinoEngine}[request.param]
    return kind("lookup", path, INPUTS, OUTPUTS, Precision.FP32, threads=1)


def feeds(rows: int = 3) -> dict[str, np.ndarray]:
    return {
        "x": np.ones((rows, 4), np.float32),
        "table": np.arange(40, dtype=np.float32).reshape(10, 4),
        "ids": np.arange(rows, dtype=np.int64) + 5,
    }


def test_an_optional_input_may_be_left_out(engine: Engine) -> None:
    y = engine.run(feeds())["y"]

    np.testing.assert_array_equal(y, np.arange(20, 32, dtype=np.float32).reshape(3, 4) + 1)


def test_a_bound_table_is_read_where_it_lies(engine: Engine) -> None:
    given = feeds()
    table = given["table"]
    binding = engine.bind({"x": (3, 4), "ids": (3,)}, {"table": table})
    binding.inputs["ids"].write(..., [0, 1, 9])

    table[9] = 100  # after the binding, before the run
    binding.run()
    np.testing.assert_array_equal(binding.outputs["y"].numpy(), [[0, 1, 2, 3], [4, 5, 6, 7], [100] * 4])
    binding.inputs["x"].write((slice(0, 1), 2), 0.5)
    table[1] = -1
    binding.run()
    np.testing.assert_array_equal(binding.outputs["y"].numpy(), [[0, 1, 2.5, 3], [-1] * 4, [100] * 4])
    assert np.shares_memory(np.from_dlpack(binding.outputs["y"]), binding.outputs["y"].numpy())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": np.zeros(3)}, r"lookup has no input 'w', it takes x, table, ids, bias"),
        ({"x": np.ones((3, 4))}, r"'x' of lookup is float64, the graph takes x float32\[B, 4\]: cast it to float32"),
        ({"x": np.ones((3, 5), np.float32)}, r"'x' of lookup is 3x5, the graph takes x float32\[B, 4\]"),
        ({"x": np.ones(4, np.float32)}, r"'x' of lookup has 1 axes 4, the graph takes x float32\[B, 4\]"),
        ({"ids": np.ones(2, np.int64)}, r"'ids' of lookup is 2, so B = 2, but 'x' has B = 3: both must agree"),
        ({"x": np.ones((0, 4), np.float32)}, r"'x' of lookup is 0x4: every axis of .* is at least 1"),
    ],
)
def test_a_wrong_feed_is_named_before_the_engine_sees_it(
    engine: Engine, change: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(FeedError, match=message):
        engine.run({**feeds(), **change})


def test_a_missing_feed_is_named(engine: Engine) -> None:
    with pytest.raises(FeedError, match="lookup was not given table, ids; it takes x, table, ids, bias"):
        engine.run({"x": np.ones((3, 4), np.float32)})


def test_what_fails_inside_the_graph_is_an_engine_error_of_one_line(path: Path) -> None:
    engine = OnnxRuntimeEngine("lookup", path, INPUTS, OUTPUTS, Precision.FP32, threads=1)
    given = feeds()
    given["ids"][0] = 10

    with pytest.raises(EngineError, match=r"graph 'lookup' failed: .*out of data bounds") as caught:
        engine.run(given)
    assert "\n" not in str(caught.value)


def test_a_graph_that_is_not_what_its_manifest_says_is_refused(engine: Engine, path: Path) -> None:
    with pytest.raises(EngineError, match=r"takes bias, ids, table, x, its manifest says x:"):
        type(engine)("lookup", path, INPUTS[:1], OUTPUTS, Precision.FP32)  # type: ignore[call-arg]


def test_a_broken_graph_is_named(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no graph")

    with pytest.raises(EngineError, match=r"cannot open graph 'lookup' .*broken.onnx") as caught:
        type(engine)("lookup", tmp_path / "broken.onnx", INPUTS, OUTPUTS, Precision.FP32)  # type: ignore[call-arg]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("package", "kind"), [("onnxruntime", OnnxRuntimeEngine), ("openvino", OpenVinoEngine)])
def test_an_absent_package_names_the_line_that_installs_it(
    path: Path, monkeypatch: pytest.MonkeyPatch, package: str, kind: type
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    extra = {"onnxruntime": "cpu"}.get(package, package)

    with pytest.raises(MissingPackage, match=rf"{package} is not installed: pip install 'oneword\[{extra}\]'"):
        kind("lookup", path, INPUTS, OUTPUTS, Precision.FP32)


def test_what_computes_is_reported(engine: Engine) -> None:
    assert re.fullmatch(r"(onnxruntime [\d.]+ cpu fp32)|(openvino [\d.]+ cpu (fp32|bf16))", engine.backend)


def test_a_session_is_opened_once_however_often_it_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ort = pytest.importorskip("onnxruntime")
    opened = []

    class Counted(ort.InferenceSession):  # type: ignore[misc, name-defined]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            opened.append(args)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(ort, "InferenceSession", Counted)
    engine = OnnxRuntimeEngine("lookup", path, INPUTS, OUTPUTS, Precision.FP32, threads=1)
    for rows in (2, 3):
        given = feeds(rows=rows)
        binding = engine.bind({}, given)
        for run in range(150):
            given["x"][:] = run
            binding.run()
            np.testing.assert_array_equal(binding.outputs["y"].numpy(), run + given["table"][given["ids"]])
    assert len(opened) == 1


def test_weights_of_a_large_graph_are_not_reordered_and_it_gives_the_same(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ort = pytest.importorskip("onnxruntime")
    levels = []

    class Noted(ort.InferenceSession):  # type: ignore[misc, name-defined]
        def __init__(self, file: str, options: Any, **kwargs: Any) -> None:
            levels.append(options.graph_optimization_level)
            super().__init__(file, options, **kwargs)

    monkeypatch.setattr(ort, "InferenceSession", Noted)
    given = feeds()
    results = []
    for size, limit in (("small", path.stat().st_size), ("large", path.stat().st_size - 1)):
        monkeypatch.setattr("oneword.engines.onnxruntime._LARGE", limit)
        results.append(OnnxRuntimeEngine(size, path, INPUTS, OUTPUTS, Precision.FP32, threads=1).run(given)["y"])

    assert levels == [ort.GraphOptimizationLevel.ORT_ENABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED]
    for result in results:
        np.testing.assert_array_equal(result, given["x"] + given["table"][given["ids"]])


def test_an_openvino_binding_that_runs_often_gets_a_graph_of_its_own_shapes_and_gives_the_same(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    engine = OpenVinoEngine("lookup", path, INPUTS, OUTPUTS, Precision.FP32, threads=1)
    monkeypatch.setattr("oneword.engines.openvino.OFTEN", 2)
    given = feeds()
    binding = engine.bind({}, given)
    compiled = set()
    for run in range(5):
        given["x"][:] = run
        binding.run()
        np.testing.assert_array_equal(binding.outputs["y"].numpy(), run + given["table"][given["ids"]])
        compiled.add(id(binding._request))
    assert len(compiled) == 2
    other = engine.bind({}, feeds(rows=2))  # the engine still takes any shape
    other.run()
    assert other.outputs["y"].shape == (2, 4)
