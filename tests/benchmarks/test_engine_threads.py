"""The settings of an engine's threads reach the engine."""

import os
import sys
from pathlib import Path

import pytest

from benchmarks import engine_threads, turns


def test_a_shipped_setting_is_bold_where_another_of_its_engine_is_a_tenth_faster() -> None:
    milliseconds = {
        "onnxruntime, shipped": {"alone": 100.0, "beside": 300.0, "cpu": 190.0},
        "onnxruntime, sleeps": {"alone": 95.0, "beside": 200.0, "cpu": 150.0},
        "openvino, shipped": {"alone": 90.0, "beside": 180.0, "cpu": 170.0},
    }

    text = engine_threads.threads_table(milliseconds, 1)

    assert "| onnxruntime, shipped | 100 | **300** | 3.00 | 190 |" in text
    assert "| onnxruntime, sleeps | 95 | 200 | 2.11 | 150 |" in text
    assert "| openvino, shipped | 90 | 180 | 2.00 | 170 |" in text


def test_onnx_runtime_opens_its_sessions_with_the_setting(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ort = pytest.importorskip("onnxruntime")
    from oneword.runtime.model import Model

    monkeypatch.setattr(ort, "InferenceSession", ort.InferenceSession)  # restored afterwards
    engine_threads.set_onnxruntime(engine_threads.SETTINGS["onnxruntime, spins on"])
    engine = Model.open(tiny_bundle, "onnxruntime", threads=1).engine("vae_decoder")
    options = engine._session.get_session_options()  # type: ignore[attr-defined]

    assert options.get_session_config_entry("session.force_spinning_stop") == "0"


@pytest.mark.parametrize(("setting", "pinned"), [("shipped", False), ("pinned", True)])
def test_openvino_compiles_its_graphs_with_the_setting(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, setting: str, pinned: bool
) -> None:
    openvino = pytest.importorskip("openvino")
    from oneword.runtime.model import Model

    monkeypatch.setattr(openvino, "Core", openvino.Core)
    engine_threads.set_openvino(engine_threads.SETTINGS[f"openvino, {setting}"])
    engine = Model.open(tiny_bundle, "openvino", threads=1).engine("vae_decoder")

    assert engine._compiler.compile().model.get_property("ENABLE_CPU_PINNING") == pinned  # type: ignore[attr-defined]


def test_a_process_works_in_turns_and_one_that_does_not_start_is_named() -> None:
    """Each turn sleeps twice for 20 ms: 20 ms of time, and no processor time, for one of them."""
    program = "import time; from benchmarks import turns; turns.serve(lambda: time.sleep(0.02), 2)"
    commands = {"sleeps": [sys.executable, "-c", program]}

    alone, beside = turns.measure(commands, {"sleeps": os.environ}, rounds=2, busy=1)

    for by_name in (alone, beside):
        for turn in by_name["sleeps"]:
            assert turn["ms"] >= 20
            assert turn["cpu_ms"] < 20
        assert len(by_name["sleeps"]) == 2
    broken = {"broken": [sys.executable, "-c", "raise SystemExit"]}
    with pytest.raises(SystemExit, match="broken does not run: is everything installed that it needs"):
        turns.measure(broken, {"broken": os.environ}, rounds=1, busy=0)
