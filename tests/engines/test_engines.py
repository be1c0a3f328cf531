"""A small graph, y = x + table[ids] + bias, through every CPU backend, including the torch modules."""

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from oneword.engines import onnxruntime
from oneword.engines.engine import Engine
from oneword.engines.errors import EngineError, FeedError, MissingPackage
from oneword.engines.graph import DType, Graph, Precision, TensorSpec, graph_digest
from oneword.engines.onnxruntime import OnnxRuntimeEngine
from oneword.engines.openvino import OpenVinoEngine
from oneword.export.eager import EagerEngine
from oneword.export.families import Traceable

INPUTS = (
    TensorSpec("x", DType.FLOAT32, ("B", 4)),
    TensorSpec("table", DType.FLOAT32, ("V", 4)),
    TensorSpec("ids", DType.INT64, ("B",)),
    TensorSpec("bias", DType.FLOAT32, ("B", 4), optional=True),
)
OUTPUTS = (TensorSpec("y", DType.FLOAT32, ("B", 4)),)
KINDS: dict[str, Any] = {"onnxruntime": OnnxRuntimeEngine, "openvino": OpenVinoEngine}


def graph(path: Path, inputs: tuple[TensorSpec, ...] = INPUTS) -> Graph:
    return Graph((path.name,), graph_digest(path.parent, [path.name]), Precision.FP32, inputs, OUTPUTS)


def opened(kind: Any, path: Path, name: str = "lookup") -> Any:
    return kind(name, graph(path), path.parent, threads=1)


class Lookup(torch.nn.Module):
    """The same graph in torch. The weight only sets the dtype it computes in."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, table: torch.Tensor, ids: torch.Tensor, bias: torch.Tensor) -> tuple[Any]:
        return (x + table[ids] + bias,)


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


@pytest.fixture(scope="module", params=["onnxruntime", "openvino", "eager"])
def engine(path: Path, request: pytest.FixtureRequest) -> Engine:
    if request.param == "eager":
        return EagerEngine(Traceable("lookup", Lookup(), INPUTS, OUTPUTS, {}))
    pytest.importorskip(request.param)
    engine: Engine = opened(KINDS[request.param], path)
    return engine


@pytest.fixture(params=["onnxruntime", "openvino"])
def kind(request: pytest.FixtureRequest) -> Any:
    """The engine classes that open a file."""
    pytest.importorskip(request.param)
    return KINDS[request.param]


def feeds(rows: int = 3) -> dict[str, np.ndarray]:
    return {
        "x": np.ones((rows, 4), np.float32),
        "table": np.arange(40, dtype=np.float32).reshape(10, 4),
        "ids": np.arange(rows, dtype=np.int64) + 5,
    }


def test_an_optional_input_may_be_omitted(engine: Engine) -> None:
    y = engine.run(feeds())["y"]

    np.testing.assert_array_equal(y, np.arange(20, 32, dtype=np.float32).reshape(3, 4) + 1)


def test_a_bound_table_is_read_in_place(engine: Engine) -> None:
    table = feeds()["table"]
    binding = engine.bind({"x": (3, 4), "ids": (3,)}, {"table": table})
    binding.inputs["ids"].write(..., [0, 1, 9])

    table[9] = 100  # after the binding, before the run
    binding.run()
    np.testing.assert_array_equal(binding.outputs["y"].numpy(), [[0, 1, 2, 3], [4, 5, 6, 7], [100] * 4])
    binding.inputs["x"].write((slice(0, 1), 2), 0.5)
    table[1] = -1
    binding.run()
    np.testing.assert_array_equal(binding.outputs["y"].numpy(), [[0, 1, 2.5, 3], [-1] * 4, [100] * 4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": np.zeros(3)}, r"lookup has no input 'w', it takes x, table, ids, bias"),
        ({"x": np.ones((3, 4))}, r"'x' of lookup is float64, the graph takes x float32\[B, 4\]: cast it to float32"),
        ({"x": np.ones((3, 5), np.float32)}, r"'x' of lookup is 3x5, the graph takes x float32\[B, 4\]"),
        ({"x": np.ones(4, np.float32)}, r"'x' of lookup has 1 axes 4, the graph takes x float32\[B, 4\]"),
        ({"ids": np.ones(2, np.int64)}, r"'ids' of lookup is 2, so B = 2, but 'x' has B = 3: both must agree"),
        ({"x": np.ones((0, 4), np.float32)}, r"'x' of lookup is 0x4: every axis of .* must be at least 1"),
    ],
)
def test_a_wrong_feed_is_reported_before_the_engine_sees_it(
    engine: Engine, change: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(FeedError, match=message):
        engine.run({**feeds(), **change})


def test_a_missing_feed_is_named_in_the_error(engine: Engine) -> None:
    with pytest.raises(FeedError, match="lookup was not given table, ids; it takes x, table, ids, bias"):
        engine.run({"x": np.ones((3, 4), np.float32)})


def test_a_failure_inside_the_graph_is_an_engine_error_of_one_line(path: Path) -> None:
    arrays = feeds()
    arrays["ids"][0] = 10

    with pytest.raises(EngineError, match=r"graph 'lookup' failed: .*out of data bounds") as caught:
        opened(OnnxRuntimeEngine, path).run(arrays)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        (slice(1), ("y", ("B", 4)), "takes bias, ids, table, x, its manifest says x:"),
        (slice(4), ("z", ("B", 4)), "returns y, its manifest says z:"),
        (slice(4), ("y", ("B",)), r"returns y \[[^,]+, 4\], its manifest says y float32\[B\]:"),
        (slice(4), ("y", ("B", 5)), r"returns y \[[^,]+, 4\], its manifest says y float32\[B, 5\]:"),
    ],
)
def test_a_graph_that_differs_from_its_manifest_is_refused(
    kind: Any, path: Path, inputs: slice, outputs: tuple[str, tuple[str | int, ...]], message: str
) -> None:
    name, axes = outputs
    changed = msgspec.structs.replace(graph(path, INPUTS[inputs]), outputs=(TensorSpec(name, DType.FLOAT32, axes),))
    with pytest.raises(EngineError, match=message):
        kind("lookup", changed, path.parent)


def test_a_broken_graph_is_named_in_the_error(kind: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no graph")

    with pytest.raises(EngineError, match=r"cannot open graph 'lookup' .*broken.onnx") as caught:
        opened(kind, tmp_path / "broken.onnx")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("package", KINDS)
def test_the_error_for_a_missing_package_gives_the_pip_command(
    path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    extra = {"onnxruntime": "cpu"}.get(package, package)

    with pytest.raises(MissingPackage, match=rf"{package} is not installed: in a checkout .* -e '\.\[{extra}\]'"):
        opened(KINDS[package], path)


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_cannot_be_loaded_is_an_error_and_not_replaced_by_the_cpu(path: Path) -> None:
    """ONNX Runtime would go on with its CPU provider."""
    if "CUDAExecutionProvider" in onnxruntime.available_providers():
        pytest.skip("this build of onnxruntime has it")
    with pytest.raises(EngineError, match=r"^ONNX Runtime cannot load CUDAExecutionProvider for graph"):
        onnxruntime.open_session("lookup", path, [("CUDAExecutionProvider", {})], threads=1)


def test_a_call_that_fails_is_reported_once(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """By the exception, whose message ONNX Runtime would also log, in colours."""
    lookup = opened(OnnxRuntimeEngine, path)
    arrays = feeds(rows=3) | {"ids": np.full(3, 99)}

    with pytest.raises(EngineError, match=r"^graph 'lookup' failed: .*indices element out of data bounds"):
        lookup.run(arrays)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("package", KINDS)
def test_an_installed_package_that_cannot_be_imported_is_not_called_missing(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str
) -> None:
    (tmp_path / f"{package}.py").write_text("raise ImportError('libcudart.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, package, raising=False)

    with pytest.raises(EngineError, match=f"^{package} is installed but cannot be imported: libcudart.so: cannot open"):
        opened(KINDS[package], path)


@pytest.mark.parametrize("shadowed", [False, True])
def test_two_builds_of_onnx_runtime_are_refused_only_in_one_folder(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shadowed: bool
) -> None:
    for name in ("onnxruntime", "onnxruntime-gpu"):
        folder = tmp_path / (name if shadowed else "site-packages")
        metadata = folder / f"{name.replace('-', '_')}-1.0.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        monkeypatch.syspath_prepend(folder)

    if shadowed:
        opened(OnnxRuntimeEngine, path)
    else:
        with pytest.raises(EngineError, match=r"are both installed and overwrite each other: pip uninstall"):
            opened(OnnxRuntimeEngine, path)


def test_the_backend_is_reported_with_version_device_and_precision(engine: Engine) -> None:
    kinds = r"(onnxruntime [\d.]+ cpu fp32)|(openvino [\d.]+ cpu (fp32|bf16))|(eager [\d.]+(\+cpu)? cpu fp32)"
    assert re.fullmatch(kinds, engine.backend)


def test_a_session_is_opened_once_however_often_it_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ort = pytest.importorskip("onnxruntime")
    sessions = []

    class Counted(ort.InferenceSession):  # type: ignore[misc, name-defined]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            sessions.append(args)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(ort, "InferenceSession", Counted)
    engine = opened(OnnxRuntimeEngine, path)
    for rows in (2, 3):
        arrays = feeds(rows=rows)
        binding = engine.bind({}, arrays)
        for run in range(150):
            arrays["x"][:] = run
            binding.run()
            np.testing.assert_array_equal(binding.outputs["y"].numpy(), run + arrays["table"][arrays["ids"]])
    assert len(sessions) == 1


def test_weights_of_a_large_graph_are_not_reordered_and_its_output_is_the_same(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ort = pytest.importorskip("onnxruntime")
    levels = []

    class Noted(ort.InferenceSession):  # type: ignore[misc, name-defined]
        def __init__(self, file: str, options: Any, **kwargs: Any) -> None:
            levels.append(options.graph_optimization_level)
            super().__init__(file, options, **kwargs)

    monkeypatch.setattr(ort, "InferenceSession", Noted)
    arrays = feeds()
    results = []
    for size, limit in (("small", path.stat().st_size), ("large", path.stat().st_size - 1)):
        monkeypatch.setattr("oneword.engines.onnxruntime._LARGE", limit)
        results.append(opened(OnnxRuntimeEngine, path, size).run(arrays)["y"])

    assert levels == [ort.GraphOptimizationLevel.ORT_ENABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED]
    for result in results:
        np.testing.assert_array_equal(result, arrays["x"] + arrays["table"][arrays["ids"]])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_graphs_that_are_not_small_share_the_memory_that_they_compute_in(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    nodes = [
        helper.make_node("Expand", ["x", "shape"], ["wide"]),
        helper.make_node("Sin", ["wide"], ["sines"]),  # both of 128 MiB
        helper.make_node("ReduceMean", ["sines"], ["y"], keepdims=1),
    ]
    inputs, outputs = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 1])] for name in "xy")
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [1, 32 << 20])
    made = helper.make_graph(nodes, "mean", inputs, outputs, [shape])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "g.onnx")
    code = r"""if True:
        import re, sys
        from pathlib import Path
        import numpy as np
        from oneword.engines import onnxruntime

        x = np.zeros((1, 1), np.float32)
        line = (Path(sys.argv[1]), ["CPUExecutionProvider"], 1, int(sys.argv[2]))
        sessions = [onnxruntime.open_session("mean", *line) for _ in range(3)]
        for session in [*sessions, *sessions]:
            assert session.run(["y"], {"x": x})[0].item() == 0
        print(int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) >> 10)
    """

    def peak(size: int) -> int:
        line = [sys.executable, "-c", code, str(tmp_path / "g.onnx"), str(size)]
        return int(subprocess.run(line, capture_output=True, text=True, check=True, timeout=100).stdout)

    assert peak(33 << 20) < peak(32 << 20) - 400  # MiB: three sessions would need 256 each, or 512 with patterns


def test_given_outputs_are_used_in_place(engine: Engine) -> None:
    arrays, y = feeds(), np.full((3, 4), np.nan, np.float32)
    binding = engine.bind({}, arrays, {"y": y})
    binding.run()

    np.testing.assert_array_equal(y, arrays["x"] + arrays["table"][arrays["ids"]])
    assert np.shares_memory(binding.outputs["y"].numpy(), y)
    for name, value in arrays.items():
        assert np.shares_memory(binding.inputs[name].numpy(), value)


def test_bindings_share_the_buffers_they_are_given(engine: Engine) -> None:
    """As in the denoiser: one binding's buffers are another's, whether or not their sizes are the same."""
    first = engine.bind({"x": (3, 4), "table": (10, 4), "ids": (3,)})
    other_ids = np.array([9, 8, 7])
    shared = {name: first.inputs[name] for name in ("x", "table", "bias")}
    second = engine.bind({}, {**shared, "ids": other_ids}, first.outputs)
    table = np.arange(40, dtype=np.float32).reshape(10, 4)
    first.inputs["table"].write(..., table)
    first.inputs["ids"].write(..., [1, 2, 3])

    for turn in range(3):
        first.inputs["x"].write(..., turn)
        first.run()
        np.testing.assert_array_equal(second.outputs["y"].numpy(), turn + table[[1, 2, 3]])
        second.run()
        np.testing.assert_array_equal(first.outputs["y"].numpy(), turn + table[other_ids])


def test_an_output_of_one_binding_is_an_input_of_another(engine: Engine) -> None:
    arrays = feeds()
    first = engine.bind({}, arrays)
    second = engine.bind({}, {**arrays, "x": first.outputs["y"]})
    first.run()
    second.run()

    np.testing.assert_array_equal(second.outputs["y"].numpy(), arrays["x"] + 2 * arrays["table"][arrays["ids"]])


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"z": np.zeros((3, 4), np.float32)}, r"lookup has no input 'z', it takes x, table, ids, bias"),
        ({"y": np.zeros((3, 4))}, r"'y' of lookup is float64, the graph takes y float32\[B, 4\]: cast it to float32"),
        ({"y": np.zeros((3, 4, 1), np.float32)}, r"'y' of lookup has shape 3x4x1, the graph returns y float32\[B, 4\]"),
        ({"y": np.zeros((4, 3), np.float32).T}, r"'y' of lookup is not contiguous"),
        ({"y": np.zeros((2, 4), np.float32)}, r"'y' of lookup has shape 2x4, the graph returns .* with B = 3$"),
        ({"y": np.zeros((3, 5), np.float32)}, r"'y' of lookup has shape 3x5, the graph returns y float32\[B, 4\]"),
    ],
)
def test_a_wrong_output_is_reported_before_the_engine_sees_it(
    engine: Engine, outputs: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(FeedError, match=message):
        engine.bind({}, feeds(), outputs)


def test_a_region_is_read_as_a_copy(engine: Engine) -> None:
    binding = engine.bind({}, feeds())
    binding.run()
    row = binding.outputs["y"].read(1)
    before = row.copy()
    binding.outputs["y"].write(..., 0.0)

    np.testing.assert_array_equal(row, before)
    assert binding.outputs["y"].read((slice(None), 2)).shape == (3,)


def test_a_cpu_engine_has_no_limits_and_is_not_captured(engine: Engine) -> None:
    assert dict(engine.limits) == {}
    assert not engine.bind({}, feeds()).capturable


def test_openvino_bindings_of_one_graph_take_turns_on_its_infer_request(path: Path) -> None:
    pytest.importorskip("openvino")
    engine = opened(OpenVinoEngine, path)
    batches = [feeds(rows=2), feeds(rows=2), feeds(rows=3)]
    bindings = [engine.bind({}, batch) for batch in batches]
    assert len({id(binding._compiled) for binding in bindings}) == 1

    for turn, index in enumerate([0, 1, 2, 2, 1, 0, 0, 2, 1, 0, 1]):
        batches[index]["x"][:] = turn
        before = [binding.outputs["y"].numpy().copy() for binding in bindings]
        bindings[index].run()
        for i, binding in enumerate(bindings):
            expected = before[i] if i != index else turn + batches[i]["table"][batches[i]["ids"]]
            np.testing.assert_array_equal(binding.outputs["y"].numpy(), expected)


def test_an_openvino_binding_that_runs_often_gets_a_graph_for_its_shapes_with_the_same_output(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    engine = opened(OpenVinoEngine, path)
    monkeypatch.setattr("oneword.engines.openvino.OFTEN", 2)
    arrays = feeds()
    binding = engine.bind({}, arrays)
    compiled = set()
    deadline = time.monotonic() + 60
    run = 0
    while run < 5 or len(compiled) < 2:  # it is compiled in the background, and used by a later run
        assert time.monotonic() < deadline
        run += 1
        arrays["x"][:] = run
        binding.run()
        np.testing.assert_array_equal(binding.outputs["y"].numpy(), run + arrays["table"][arrays["ids"]])
        compiled.add(id(binding._compiled))
    assert binding._compiled.static
    smaller = engine.bind({}, feeds(rows=2))  # the engine still accepts any shape
    smaller.run()
    np.testing.assert_array_equal(smaller.outputs["y"].numpy(), feeds(2)["x"] + feeds(2)["table"][feeds(2)["ids"]])


def test_an_openvino_binding_keeps_running_if_its_shapes_cannot_be_compiled(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    engine = opened(OpenVinoEngine, path)
    monkeypatch.setattr("oneword.engines.openvino.OFTEN", 1)
    binding = engine.bind({}, feeds())

    def refuse(shapes: object = None) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(engine._compiler, "compile", refuse)
    for run in range(4):
        binding.inputs["x"].write(..., run)
        binding.run()
        np.testing.assert_array_equal(binding.outputs["y"].numpy(), run + feeds()["table"][feeds()["ids"]])
    assert not binding._compiled.static
