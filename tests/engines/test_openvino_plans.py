"""OpenVINO compiles a graph once; later starts read the plan."""

import gc
import shutil
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from oneword.engines.engine import NumpyArray, ShapeUse
from oneword.engines.errors import EngineError
from oneword.engines.graph import DType, Graph, Precision, TensorSpec
from oneword.engines.openvino import (
    OFTEN,
    OpenVinoBinding,
    OpenVinoEngine,
    _Compiler,
)
from oneword.engines.plans import PlanCache, PlanKey

openvino = pytest.importorskip("openvino")

INPUTS = (TensorSpec("x", DType.FLOAT32, ("B", 4)),)
OUTPUTS = (TensorSpec("y", DType.FLOAT32, ("B", 4)),)
X = np.arange(8, dtype=np.float32).reshape(2, 4)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """y = x + 1."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 4]) for name in "xy"]
    unit = helper.make_tensor("unit", TensorProto.FLOAT, [1], [1.0])
    graph = helper.make_graph([helper.make_node("Add", ["x", "unit"], ["y"])], "add", values[:1], values[1:], [unit])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "a.onnx")
    return tmp_path / "a.onnx"


def engine(
    path: Path,
    plans: PlanCache | None,
    digest: str = "d",
    exact: bool = True,
    inputs: tuple[TensorSpec, ...] = INPUTS,
) -> OpenVinoEngine:
    graph = Graph((path.name,), digest, Precision.FP32, inputs, OUTPUTS)
    return OpenVinoEngine("add", graph, path.parent, 1, exact, plans)


def run_until_compiled(binding: OpenVinoBinding, turns: int) -> None:
    """Runs at least `turns` times, and until the graph compiled in the background is in use."""
    deadline = time.monotonic() + 60
    turn = 0
    while turn < turns or not binding._compiled.static:
        assert time.monotonic() < deadline
        binding.inputs["x"].write(..., turn)
        binding.run()
        np.testing.assert_array_equal(binding.outputs["y"].numpy(), np.full(binding.outputs["y"].shape, turn + 1))
        turn += 1


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one for every graph that is compiled."""
    devices: list[str] = []
    compile_model = openvino.Core.compile_model

    def noted(self: Any, *args: Any) -> Any:
        devices.append(args[1])
        return compile_model(self, *args)

    monkeypatch.setattr(openvino.Core, "compile_model", noted)
    return devices


def test_a_graph_is_compiled_at_the_first_start_only(path: Path, tmp_path: Path, compilations: list[str]) -> None:
    for _ in range(3):
        opened = engine(path, PlanCache(tmp_path / "plans"))
        np.testing.assert_array_equal(opened.run({"x": X})["y"], X + 1)
        binding = opened.bind({"x": (2, 4)}, {"x": X})
        binding.run()
        np.testing.assert_array_equal(binding.outputs["y"].numpy(), X + 1)

    assert len(compilations) == 1


def test_another_graph_or_precision_has_another_plan(path: Path, tmp_path: Path, compilations: list[str]) -> None:
    plans = PlanCache(tmp_path / "plans")
    low = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    engine(path, plans)
    engine(path, plans, digest="e")
    engine(path, plans, exact=False)

    assert len(compilations) == 2 + low
    assert len(list((tmp_path / "plans").glob("*.plan"))) == 2 + low


def test_a_plan_that_has_changed_is_never_loaded(path: Path, tmp_path: Path, compilations: list[str]) -> None:
    plans = PlanCache(tmp_path / "plans")
    engine(path, plans)
    [plan] = (tmp_path / "plans").glob("*.plan")
    good = plan.read_bytes()
    plan.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))

    np.testing.assert_array_equal(engine(path, plans).run({"x": X})["y"], X + 1)

    assert len(compilations) == 2
    assert plan.read_bytes() != good[:-1] + bytes([good[-1] ^ 1])


def test_an_input_whose_conversion_openvino_removes_keeps_its_name(tmp_path: Path) -> None:
    halved = """
    <ir_version: 10, opset_import: ["" : 20]>
    halved (float[B] x) => (float[B] y) {
      a = Cast <to = 10> (x)
      half = Add(a, a)
      y = Cast <to = 1> (half)
    }"""
    onnx.save(onnx.parser.parse_model(halved), tmp_path / "halved.onnx")
    x, y = (TensorSpec(name, DType.FLOAT32, ("B",)) for name in "xy")
    graph = Graph(("halved.onnx",), "d", Precision.FP16, (x,), (y,))
    outputs = OpenVinoEngine("halved", graph, tmp_path, 1).run({"x": np.array([1, 2], np.float32)})
    assert outputs["y"].tolist() == [2, 4]  # OpenVINO calls the input "a" first


def test_a_graph_whose_plan_openvino_refuses_is_compiled_again(
    path: Path, tmp_path: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = PlanCache(tmp_path / "plans")
    monkeypatch.setattr(PlanCache, "load", lambda self, key: b"no plan")

    np.testing.assert_array_equal(engine(path, plans).run({"x": X})["y"], X + 1)

    assert len(compilations) == 1


def test_the_graph_runs_even_if_no_plan_can_be_written(path: Path, tmp_path: Path) -> None:
    (tmp_path / "plans").write_text("a file where the folder should be")

    np.testing.assert_array_equal(engine(path, PlanCache(tmp_path / "plans")).run({"x": X})["y"], X + 1)


def test_a_binding_that_runs_often_is_compiled_for_its_shapes_and_keeps_its_buffers(
    path: Path, tmp_path: Path, compilations: list[str]
) -> None:
    opened = engine(path, PlanCache(tmp_path / "plans"))
    binding = opened.bind({"x": (2, 4)})
    seldom = opened.bind({"x": (3, 4)})
    run_until_compiled(binding, 105)
    seldom.run()

    assert len(compilations) == 2
    assert len(list((tmp_path / "plans").glob("*.plan"))) == 2
    again = engine(path, PlanCache(tmp_path / "plans")).bind({"x": (2, 4)}, {"x": X})
    again.run()
    np.testing.assert_array_equal(again.outputs["y"].numpy(), X + 1)
    assert again._compiled.static
    run_until_compiled(again, 105)
    assert len(compilations) == 2  # the second start compiles nothing


@pytest.mark.parametrize("with_plans", [True, False])
def test_the_runs_of_bindings_that_come_and_go_are_counted_together(
    path: Path, tmp_path: Path, compilations: list[str], with_plans: bool
) -> None:
    """As those of pictures that are drawn one after another, each with a scheduler of its own."""
    opened = engine(path, PlanCache(tmp_path / "plans") if with_plans else None)
    for _ in range(OFTEN - 1):
        opened.bind({"x": (2, 4)}).run()
        opened.bind({"x": (3, 4)}).run()
    assert len(compilations) == 1
    run_until_compiled(opened.bind({"x": (2, 4)}), 2)
    assert len(compilations) == 2

    binding = opened.bind({"x": (2, 4)}, {"x": X})
    binding.run()

    assert binding._compiled.static
    assert len(compilations) == 2
    np.testing.assert_array_equal(binding.outputs["y"].numpy(), X + 1)


def test_the_plan_of_an_earlier_start_is_read_once_for_bindings_that_come_and_go(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_until_compiled(engine(path, PlanCache(tmp_path / "plans")).bind({"x": (2, 4)}), OFTEN)
    imported = list[Any]()
    import_model = openvino.Core.import_model

    def noted(self: Any, *args: Any) -> Any:
        imported.append(args)
        return import_model(self, *args)

    monkeypatch.setattr(openvino.Core, "import_model", noted)
    opened = engine(path, PlanCache(tmp_path / "plans"))
    bindings = [opened.bind({"x": (2, 4)}, {"x": X}) for _ in range(5)]

    assert len(imported) == 2  # for any shape, and for this one
    for binding in bindings:
        assert binding._compiled.static
        binding.run()
        np.testing.assert_array_equal(binding.outputs["y"].numpy(), X + 1)


@pytest.mark.parametrize("with_plans", [True, False])
def test_a_specialized_version_is_shared(path: Path, tmp_path: Path, compilations: list[str], with_plans: bool) -> None:
    opened = engine(path, PlanCache(tmp_path / "plans") if with_plans else None)
    first, second = opened.bind({"x": (2, 4)}), opened.bind({"x": (2, 4)})
    first.specialize()
    second.specialize()

    assert len(compilations) == 2  # for any shape, and for this one
    assert opened.bind({"x": (2, 4)})._compiled is second._compiled is first._compiled


def test_versions_that_were_not_used_lately_are_forgotten(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oneword.engines.openvino._MOST_STATIC", 1)
    for rows in (1, 2):
        run_until_compiled(engine(path, PlanCache(tmp_path / "plans")).bind({"x": (rows, 4)}), OFTEN)
    opened = engine(path, PlanCache(tmp_path / "plans"))

    versions = [weakref.ref(opened.bind({"x": (rows, 4)})._compiled) for rows in (1, 2)]
    gc.collect()

    assert versions[0]() is None
    assert versions[1]() is not None


def test_the_folder_of_plans_does_not_grow_without_limit(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oneword.engines.openvino._MOST_PLANS", 3)
    monkeypatch.setattr("oneword.engines.openvino.OFTEN", 1)
    opened = engine(path, PlanCache(tmp_path / "plans"))
    for rows in range(1, 9):
        run_until_compiled(opened.bind({"x": (rows, 4)}), 3)

    assert len(list((tmp_path / "plans").glob("*.plan"))) == 3


def test_plans_of_other_versions_make_room_for_those_of_this_one(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compilations: list[str]
) -> None:
    """Else every start would compile after a few updates of OpenVINO."""
    monkeypatch.setattr("oneword.engines.openvino._MOST_PLANS", 3)
    plans = PlanCache(tmp_path / "plans")
    for flag in "abc":
        plans.load_or_build(PlanKey("d", "openvino", "2020.1", "CPU", Precision.FP32, {}, (flag,)), lambda: b"plan")

    engine(path, plans)
    engine(path, plans)

    assert len(compilations) == 1
    assert [key.version for key in plans.recorded()] == [openvino.__version__]


def test_a_graph_runs_where_plans_cannot_be_locked(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)

    np.testing.assert_array_equal(engine(path, PlanCache(tmp_path / "plans")).run({"x": X})["y"], X + 1)


def test_a_large_graph_is_compiled_for_its_first_shapes_then_once_for_any_others(
    path: Path, tmp_path: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oneword.engines.openvino._SMALL", 0)
    opened = engine(path, PlanCache(tmp_path / "plans"))
    assert len(compilations) == 0

    first = opened.bind({"x": (2, 4)}, {"x": X})
    for _ in range(2):
        np.testing.assert_array_equal(opened.run({"x": X})["y"], X + 1)
    assert len(compilations) == 1

    for rows in (1, 3, 2):
        binding = opened.bind({"x": (rows, 4)})
        binding.run()
        np.testing.assert_array_equal(binding.outputs["y"].numpy(), np.ones((rows, 4)))
    assert first._compiled.released  # its weights are in memory once
    first.run()
    np.testing.assert_array_equal(first.outputs["y"].numpy(), X + 1)
    assert len(compilations) == 2
    assert len([*(tmp_path / "plans").glob("*.plan")]) == 2
    assert len([*(tmp_path / "plans").glob("*.xml")]) == 1


@pytest.mark.parametrize("large", [True, False])
def test_a_graph_that_was_replaced_after_it_was_opened_is_not_compiled_in_place_of_the_other(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    """Its plan would be kept under the key of the other."""
    if large:
        monkeypatch.setattr("oneword.engines.openvino._SMALL", 0)
    opened = engine(path, PlanCache(tmp_path / "plans"))
    binding = opened.bind({"x": (2, 4)}, {"x": X})
    binding.run()
    shutil.rmtree(tmp_path / "plans")
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)

    compile_again = (lambda: opened.bind({"x": (3, 4)})) if large else binding.specialize
    with pytest.raises(EngineError, match="was replaced or removed after it was opened: open the bundle again"):
        compile_again()
    binding.run()  # what was compiled before still runs
    np.testing.assert_array_equal(binding.outputs["y"].numpy(), X + 1)


def test_a_large_graph_that_is_damaged_or_has_other_inputs_is_refused_when_opened(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oneword.engines.openvino._SMALL", 0)
    with pytest.raises(EngineError, match="takes x, its manifest says z"):
        engine(path, None, inputs=(TensorSpec("z", DType.FLOAT32, ("B", 4)),))
    path.write_bytes(b"no graph")

    with pytest.raises(EngineError, match="cannot open graph 'add'"):
        engine(path, PlanCache(tmp_path / "plans"))


def test_the_error_for_a_large_graph_that_cannot_be_compiled_names_it_and_its_shapes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oneword.engines.openvino._SMALL", 0)
    opened = engine(path, None)

    def refuse(*_: Any) -> Any:
        raise RuntimeError("no kernel for this shape")

    monkeypatch.setattr(openvino.Core, "compile_model", refuse)
    with pytest.raises(EngineError, match=r"cannot compile graph 'add' for \{'x': \(2, 4\)\}"):
        opened.bind({"x": (2, 4)})


def test_the_buffers_of_a_binding_that_is_gone_are_released(path: Path) -> None:
    add, buffer = engine(path, None), np.ones((3, 4), np.float32)
    binding = add.bind({}, {"x": buffer})
    binding.run()
    alive = weakref.ref(buffer)
    del binding, buffer
    gc.collect()

    assert alive() is None
    second = add.bind({}, {"x": X})
    second.run()
    np.testing.assert_array_equal(second.outputs["y"].numpy(), X + 1)


def test_a_specialized_binding_has_a_graph_for_its_shapes_which_the_next_start_reads(
    path: Path, tmp_path: Path, compilations: list[str]
) -> None:
    for _ in range(2):
        add = engine(path, PlanCache(tmp_path / "plans"))
        binding = add.bind({}, {"x": X})
        binding.specialize()
        binding.run()

        assert add.shape_use is ShapeUse.PADDED
        assert binding._compiled.static
        np.testing.assert_array_equal(binding.outputs["y"].numpy(), X + 1)
    assert len(compilations) == 2  # for any shape, and for these


HALVED = 1 + 2.0**-12
"""A number that fp16 rounds to 1."""


@pytest.fixture
def product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """y = x @ weights * factor, large: 90,000 weights and one factor that fp16 rounds to 1."""
    monkeypatch.setattr("oneword.engines.openvino._SMALL", 0)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 300]) for name in "xy"]
    weights = helper.make_tensor("weights", TensorProto.FLOAT, [300, 300], (np.eye(300) * HALVED).ravel())
    factor = helper.make_tensor("factor", TensorProto.FLOAT, [1], [HALVED])
    nodes = [helper.make_node("MatMul", ["x", "weights"], ["m"]), helper.make_node("Mul", ["m", "factor"], ["y"])]
    graph = helper.make_graph(nodes, "product", values[:1], values[1:], [weights, factor])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "p.onnx")
    return tmp_path / "p.onnx"


def save_product(path: Path, weights: NumpyArray) -> None:
    """y = x @ weights, which are [300, 300]."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 300]) for name in "xy"]
    constant = helper.make_tensor("weights", TensorProto.FLOAT, [300, 300], weights.ravel())
    nodes = [helper.make_node("MatMul", ["x", "weights"], ["y"])]
    graph = helper.make_graph(nodes, "product", values[:1], values[1:], [constant])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


def product_of_ones(path: Path, plans: Path, precision: str = "f32", halve: bool = True) -> float:
    """What the graph returns in this precision, converted with weights rounded to fp16 or not."""
    settings = {"INFERENCE_PRECISION_HINT": precision}
    key = PlanKey("d", "openvino", openvino.__version__, "cpu", Precision.FP32, {})
    compiled = _Compiler(openvino.Core(), path, settings, PlanCache(plans), key, halve=halve).compile()
    y = compiled.model({"x": np.ones((1, 300), np.float32)})[0]
    assert (y == y[0, 0]).all()
    return float(y[0, 0])


def test_weights_are_halved_and_small_constants_are_not(product: Path, tmp_path: Path) -> None:
    assert product_of_ones(product, tmp_path / "plans") == HALVED

    [weights] = (tmp_path / "plans").glob("*.bin")
    assert 2 * 90_000 <= weights.stat().st_size < 2 * 90_000 + 100
    assert not list((tmp_path / "plans").glob("*.partial"))


def test_a_later_start_reads_the_converted_graph_only(product: Path, tmp_path: Path) -> None:
    product_of_ones(product, tmp_path / "plans")
    product.write_bytes(b"no graph")

    assert product_of_ones(product, tmp_path / "plans") == HALVED


needs_bfloat16 = pytest.mark.skipif(
    "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"), reason="needs bfloat16"
)


@pytest.mark.parametrize(
    ("precision", "halve", "weight"),
    [("f32", False, HALVED), ("f32", False, 1.0), pytest.param("bf16", True, 1.0, marks=needs_bfloat16)],
)
def test_a_later_start_reads_the_compiled_graph_which_finds_its_weights_in_the_converted_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compilations: list[str],
    precision: str,
    halve: bool,
    weight: float,
) -> None:
    monkeypatch.setattr("oneword.engines.openvino._SMALL", 0)
    save_product(tmp_path / "p.onnx", np.eye(300) * weight)

    for _ in range(3):
        assert product_of_ones(tmp_path / "p.onnx", tmp_path / "plans", precision, halve) == weight

    assert len(compilations) == 1
    [plan] = (tmp_path / "plans").glob("*.plan")
    assert plan.stat().st_size < 90_000  # the weights have at least twice as many bytes


def test_a_large_graph_has_a_compiled_plan_for_each_set_of_shapes_that_came_first(
    product: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compilations: list[str]
) -> None:
    key = PlanKey("d", "openvino", openvino.__version__, "cpu", Precision.FP32, {})
    for rows in (1, 2, 1, 2):
        settings = {"INFERENCE_PRECISION_HINT": "f32"}
        plans = PlanCache(tmp_path / "plans")
        compiler = _Compiler(openvino.Core(), product, settings, plans, key, halve=True)
        compiled = compiler.compiled_for({"x": (rows, 300)})
        assert (compiled.model({"x": np.ones((rows, 300), np.float32)})[0] == HALVED).all()

    assert len(compilations) == 2
    assert len([*plans.folder.glob("*.plan")]) == 2


@pytest.mark.parametrize("suffix", [".bin", ".xml"])
def test_a_converted_graph_that_has_changed_is_never_read(product: Path, tmp_path: Path, suffix: str) -> None:
    product_of_ones(product, tmp_path / "plans")
    [changed] = (tmp_path / "plans").glob(f"*{suffix}")
    good = changed.read_bytes()
    changed.write_bytes(good.replace(np.float16(1).tobytes(), np.float16(2).tobytes()) + b" ")

    assert product_of_ones(product, tmp_path / "plans") == HALVED
    [built_again] = (tmp_path / "plans").glob(f"*{suffix}")
    assert built_again.read_bytes() == good


def test_a_graph_whose_plan_cannot_be_written_runs_from_its_onnx_file_and_the_log_says_why(
    product: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "plans").write_text("a file where the folder should be")

    assert product_of_ones(product, tmp_path / "plans") == pytest.approx(HALVED**2, abs=1e-7)
    [record] = caplog.records
    assert (record.name, record.levelname) == ("oneword.engines", "WARNING")
    assert record.getMessage() == (
        "p.onnx is compiled from its ONNX file, which takes more memory: it cannot be kept in OpenVINO's format: "
        f"cannot write into {tmp_path / 'plans'}: File exists"
    )


@pytest.mark.parametrize("error", [RuntimeError("no operator Foo"), MemoryError("std::bad_alloc")])
def test_a_conversion_that_fails_is_tried_once_per_process_and_reported_once(
    product: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    tries = []

    def fail(*_: object, halve: bool) -> None:
        tries.append(1)
        raise error

    monkeypatch.setattr("oneword.engines.openvino.convert_graph", fail)
    for _ in range(3):
        assert product_of_ones(product, tmp_path / "plans") == pytest.approx(HALVED**2, abs=1e-7)

    assert len(tries) == 1
    [record] = caplog.records
    assert record.getMessage().endswith(f"it cannot be kept in OpenVINO's format: {error}")


def test_a_disk_without_room_is_noticed_before_anything_is_converted(
    product: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("converted although the disk is full")

    monkeypatch.setattr(openvino, "save_model", refuse)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=90_000 * (2 + 2) + 1 * (2 + 4) - 1))

    assert product_of_ones(product, tmp_path / "plans") == pytest.approx(HALVED**2, abs=1e-7)
    assert f"{tmp_path / 'plans'} has 0 MiB free, converting takes 0 MiB" in caplog.text
    assert not list((tmp_path / "plans").glob("*.partial"))


def test_an_input_to_which_openvino_gives_no_name_is_an_error_in_one_line(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unnamed = SimpleNamespace(inputs=[(set(), [])], outputs=[], small=True)
    monkeypatch.setattr("oneword.engines.openvino._Compiler", lambda *_, **__: unnamed)
    with pytest.raises(EngineError, match=r"takes \(no name\), its manifest says x: export the model again"):
        engine(path, None)


def test_a_plan_that_another_version_has_deleted_is_made_again_for_the_next_shapes(
    product: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    key = PlanKey("d", "openvino", openvino.__version__, "cpu", Precision.FP32, {})
    plans = PlanCache(tmp_path / "plans")
    compiler = _Compiler(openvino.Core(), product, settings, plans, key, halve=True)
    compiler.compiled_for({"x": (1, 300)})
    for path in [*plans.folder.glob("*.xml"), *plans.folder.glob("*.bin")]:
        path.unlink()

    compiled = compiler.compiled_for({"x": (2, 300)})

    assert (compiled.model({"x": np.ones((2, 300), np.float32)})[0] == HALVED).all()
    assert len([*plans.folder.glob("*.bin")]) == 1


def test_the_converted_graph_of_another_openvino_is_replaced(
    product: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("2025.1", "2025.2"):
        monkeypatch.setattr(openvino, "__version__", version)
        product_of_ones(product, tmp_path / "plans")

    assert {key.version for key in PlanCache(tmp_path / "plans").recorded()} == {"2025.2"}
    assert len([*(tmp_path / "plans").glob("*.bin")]) == len([*(tmp_path / "plans").glob("*.plan")]) == 1


@pytest.mark.parametrize(("scale", "halved"), [(1.0, True), (2.0**-30, False), (2.0**20, False)])
def test_weights_beyond_the_range_of_fp16_stay_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: float, halved: bool
) -> None:
    monkeypatch.setattr("oneword.engines.openvino._SMALL", 0)
    save_product(tmp_path / "p.onnx", np.eye(300) * scale)

    assert product_of_ones(tmp_path / "p.onnx", tmp_path / "plans") == scale
    [saved] = (tmp_path / "plans").glob("*.bin")
    assert (saved.stat().st_size < 3 * 90_000) == halved


def exact_product(path: Path, plans: PlanCache) -> float:
    """What an engine that computes in float32 returns for ones."""
    x, y = (TensorSpec(name, DType.FLOAT32, ("B", 300)) for name in "xy")
    graph = Graph((path.name,), "d", Precision.FP32, (x,), (y,))
    opened = OpenVinoEngine("product", graph, path.parent, 1, exact=True, plans=plans)
    outputs = opened.run({"x": np.ones((1, 300), np.float32)})["y"]
    assert (outputs == outputs[0, 0]).all()
    return float(outputs[0, 0])


def test_an_engine_that_computes_in_float32_keeps_all_weights_in_openvinos_format(
    product: Path, tmp_path: Path
) -> None:
    plans = PlanCache(tmp_path / "plans")
    first = exact_product(product, plans)
    product.write_bytes(b"no graph")

    assert first == exact_product(product, plans) == pytest.approx(HALVED**2, abs=1e-7)
    [weights] = plans.folder.glob("*.bin")
    assert 4 * 90_000 <= weights.stat().st_size < 4 * 90_000 + 100


@pytest.mark.parametrize(
    ("weight", "size"),
    [(1.5, 2), (2.0**-24, 2), (-65504.0, 2), (HALVED, 4), (2.0**-25, 4), (65536.0, 4), (1 / 3, 4)],
)
def test_an_engine_that_computes_in_float32_has_fp16_weights_where_they_are_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: float, size: int
) -> None:
    """fp16 represents 2**-24 to 65504, with 11 bits from 2**-14 on."""
    monkeypatch.setattr("oneword.engines.openvino._SMALL", 0)
    save_product(tmp_path / "p.onnx", np.eye(300) * weight)
    plans = PlanCache(tmp_path / "plans")

    assert exact_product(tmp_path / "p.onnx", plans) == np.float32(weight)
    [weights] = plans.folder.glob("*.bin")
    assert size * 90_000 <= weights.stat().st_size < size * 90_000 + 100


def test_rounded_weights_and_exact_ones_are_kept_beside_each_other(product: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert product_of_ones(product, tmp_path / "plans", halve=True) == HALVED
        assert product_of_ones(product, tmp_path / "plans", halve=False) == pytest.approx(HALVED**2, abs=1e-7)
    assert len([*(tmp_path / "plans").glob("*.bin")]) == 2
