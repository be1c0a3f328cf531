"""Layers are summed up by kind, from counters made up here and from those of both engines."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import layers

RUNS = [
    [("Conv (amx)", 3.0), ("Softmax (ref)", 1.0), ("Conv (amx)", 2.0)],
    [("Conv (amx)", 5.0), ("MatMul (amx)", 4.0)],
]


def test_layers_of_a_kind_are_added_and_runs_are_averaged() -> None:
    assert layers.by_kind(RUNS) == {"Conv (amx)": [1.5, 5.0], "MatMul (amx)": [0.5, 2.0], "Softmax (ref)": [0.5, 0.5]}


def test_the_products_share_of_the_roof_leaves_out_layers_without_products() -> None:
    """Products take 7 of 7.5 ms; their arithmetic would take 3.5."""
    assert layers.products_share(layers.by_kind(RUNS), 0.0035) == pytest.approx(0.5)
    assert layers.products_share({"Softmax (ref)": [1, 1]}, 0.0035) == 0


def test_the_kinds_that_take_little_are_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "SHOWN", 1)

    assert layers.kinds_table("openvino", {"Conv": [2, 6.0], "Add": [3, 1.5], "Mul": [1, 0.5]}, 0.42) == "\n".join(
        [
            "| openvino | layers | ms | share |",
            "| --- | ---: | ---: | ---: |",
            "| Conv | 2 | 6.00 | 75.0% |",
            "| 2 other kinds | 4 | 2.00 | 25.0% |",
            "| all; products reach 42% of the roof | 6 | 8.00 |  |",
        ]
    )


def test_a_profile_of_onnx_runtime_is_divided_into_its_runs() -> None:
    def event(name: str, operator: str, microseconds: int) -> dict[str, Any]:
        return {"cat": "Node", "name": name, "args": {"op_name": operator}, "dur": microseconds}

    events = [
        {"cat": "Session", "name": "model_run", "dur": 9},
        event("a_kernel_time", "Conv", 4000),
        event("a_fence_before", "Conv", 1),
        event("b_kernel_time", "Add", 1000),
        event("a_kernel_time", "Conv", 2000),
        event("b_kernel_time", "Add", 500),
    ]

    assert layers.runs_of(events) == [[("Conv", 4.0), ("Add", 1.0)], [("Conv", 2.0), ("Add", 0.5)]]


@pytest.mark.parametrize("engine", layers.ENGINES)
def test_both_engines_report_the_layers_of_a_step(tiny_bundle: Path, tmp_path: Path, engine: str) -> None:
    pytest.importorskip(engine)
    options = Namespace(bundle=tiny_bundle, engine=engine, size=64, threads=1, runs=2, work=tmp_path)

    kinds = layers.counted(options)

    products = {kind: values for kind, values in kinds.items() if kind.partition(" ")[0] in layers.PRODUCTS}
    assert sum(count for count, _ in products.values()) >= 20  # the tiny UNet has as many convolutions
    assert all(milliseconds > 0 for _, milliseconds in products.values())
    assert engine == "openvino" or kinds["MultiHeadAttention"][0] == 8  # ONNX Runtime runs the fused copy


@pytest.mark.parametrize(("precision", "halve"), [("bf16", True), ("f32", False)])
def test_openvinos_layers_are_those_of_the_conversion_that_the_engine_compiles(
    precision: str, halve: bool, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")

    class Converted(Exception):
        pass

    def convert(core: Any, path: Path, xml: Path, *, halve: bool) -> None:
        raise Converted(f"{path.name}, halve={halve}")

    monkeypatch.setattr("benchmarks.openvino_cpu.precision_of", lambda core: precision)
    monkeypatch.setattr("oneword.engines.openvino_conversion.convert_graph", convert)
    options = Namespace(bundle=tiny_bundle, engine="openvino", size=64, threads=1, runs=1, work=tmp_path)

    with pytest.raises(Converted, match=f"onnx, halve={halve}"):
        layers.counted(options)


def test_onnx_runtimes_layers_are_those_of_the_session_that_the_engine_opens(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large graph's weights keep their order there, so that no convolution becomes the reordered operator."""
    ort = pytest.importorskip("onnxruntime")
    monkeypatch.setattr("oneword.engines.onnxruntime._LARGE", 0)
    options = Namespace(bundle=tiny_bundle, engine="onnxruntime", size=64, threads=1, runs=1, work=tmp_path)
    open_session, seen = ort.InferenceSession, []

    def opened(path: str, settings: Any, **more: Any) -> Any:
        seen.append((settings.get_session_config_entry("session.force_spinning_stop"), more["disabled_optimizers"]))
        return open_session(path, settings, **more)

    monkeypatch.setattr(ort, "InferenceSession", opened)

    kinds = layers.counted(options)

    assert seen == [("1", ["QDQSelectorActionTransformer"])]
    assert "Conv" in {kind.replace("Fused", "") for kind in kinds}
    assert "ReorderInput" not in kinds
    assert ort.InferenceSession is opened  # only the engine's session was profiled


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_peers_unet_has_the_same_convolutions(tiny_model_dir: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    import torch
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(tiny_model_dir / "unet")

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
            return self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]

    contexts = torch.zeros(2, 77, unet.config["cross_attention_dim"])
    example = {"sample": torch.zeros(2, 4, 8, 8), "timestep": torch.tensor(1), "encoder_hidden_states": contexts}
    openvino.save_model(openvino.convert_model(Network(), example_input=example), tmp_path / "unet.xml")
    counts = []
    for engine in (layers.PEER, "openvino"):
        options = Namespace(bundle=tiny_bundle, engine=engine, size=64, threads=1, runs=1, work=tmp_path)
        options.peer = tmp_path / "unet.xml"
        kinds = layers.counted(options)
        counts.append(sum(count for kind, (count, _) in kinds.items() if kind.startswith("Convolution ")))

    assert counts[0] == counts[1] > 0
