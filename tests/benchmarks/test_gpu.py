"""The plan for an hour on a GPU, rehearsed on simulated CUDA."""

import json
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import gpu, gpu_stages, gpu_step
from benchmarks.gpu_stages import Settings
from benchmarks.gpu_step import feeds_of, finished, latency_table
from benchmarks.trace import gpu_use
from oneword.engines.open import gpu_stream
from tests.simulated_cuda import Runtime

ROOT = Path(__file__).parents[2]


def event(category: str, start: float, duration: float) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "ts": start, "dur": duration}


def test_the_gaps_of_a_gpu_are_those_that_no_stream_fills() -> None:
    """100 microseconds, of which 30 are idle: from 40 to 50 and from 70 to 90."""
    events = [
        event("cpu_op", 0, 500),
        event("kernel", 0, 40),
        event("gpu_memcpy", 10, 20),  # beside the first kernel
        event("kernel", 50, 20),
        event("gpu_memset", 90, 10),
        {"ph": "i", "cat": "kernel", "ts": 45},
    ]

    assert gpu_use(reversed(events)) == {
        "kernels": 4,
        "share busy": 0.7,
        "median gap, us": 15,
        "longest gap, us": 20,
    }
    assert gpu_use(events[:1]) == {}


def test_the_plan_takes_an_hour_at_most() -> None:
    assert sum(stage.minutes for stage in gpu.plan(["sd15", "sdxl"]).values()) <= gpu.MINUTES


@pytest.fixture
def options(tmp_path: Path) -> Namespace:
    return Namespace(work=tmp_path, minutes=60, simulated=True, models=["tiny"], bundle=None, script=None)


def test_a_stage_that_fails_is_stored_and_repeated_and_does_not_keep_the_next_from_running(
    options: Namespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = []

    def finish(command: list[str], seconds: float) -> dict[str, Any]:
        started.append(command[3])
        return {"error": "no room"} if command[3] == "arrays" else {"pictures": 2}

    monkeypatch.setattr(gpu, "finished", finish)
    for _ in range(2):
        stored = gpu.run(gpu.plan(["tiny"]), ["arrays", "cuda"], options)

    assert started == ["arrays", "cuda", "arrays"]
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["stage"], line.get("error"), line.get("result")) for line in lines[:2]] == [
        ("arrays", "no room", None),
        ("cuda", None, {"pictures": 2}),
    ]
    assert "| failed: no room |" in gpu.stage_table(stored)
    assert "| pictures 2 |" in gpu.stage_table(stored)


def test_a_stage_is_repeated_while_a_contender_has_failed_and_keeps_what_it_has_measured(
    options: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad, worse = {"step_ms": 7.0}, {"error": "no room"}, {"error": "stopped after 9 s"}
    answers = iter([{"torch": good, "tensorrt": bad}, worse, {"torch": good, "tensorrt": good}])
    monkeypatch.setattr(gpu, "finished", lambda command, seconds: next(answers))
    stored = [gpu.run(gpu.plan(["tiny"]), ["tiny-1"], options)["tiny-1"]["result"] for _ in range(4)]

    assert [entry["tensorrt"] for entry in stored] == [bad, bad, good, good]
    assert next(answers, None) is None  # the fourth call has nothing to do


def test_only_contenders_without_measurements_are_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilers run at batch 1 only; TensorRT gets the time to build a plan."""
    limits = {}

    def finish(command: list[str], seconds: float) -> dict[str, Any]:
        limits[command[3]] = seconds
        return {"error": "no room"}

    monkeypatch.setattr(gpu_step, "finished", finish)
    before = {"torch": {"step_ms": 7.0}, "onnxruntime-cuda": {"error": "no room"}}
    results = gpu_step.contend("tiny", 4, tmp_path, 60, False, before)

    assert list(limits) == ["onnxruntime-cuda", "tensorrt", "tensorrt-rtx"]
    assert limits == pytest.approx({"onnxruntime-cuda": 20, "tensorrt": 45, "tensorrt-rtx": 60}, abs=1)
    assert results == {"torch": {"step_ms": 7.0}, **{name: {"error": "no room"} for name in limits}}
    limits.clear()
    with pytest.raises(SystemExit, match="torch: no room; onnxruntime-cuda: no room"):
        gpu_step.contend("tiny", 1, tmp_path, 60, False, {})
    assert list(limits) == list(gpu_step.SHARES)


def test_random_weights_are_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import architectures

    first = architectures.random_network("tiny", "fp16", tmp_path / "weights.safetensors")
    monkeypatch.setattr(architectures, "randomize", lambda network: pytest.fail("they were drawn again"))
    second = architectures.random_network("tiny", "fp16", tmp_path / "weights.safetensors")

    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]
    assert all(bool((value == second.state_dict()[name]).all()) for name, value in first.state_dict().items())


def test_a_step_gets_copies_of_outputs_that_the_next_call_overwrites() -> None:
    """As CUDA graphs of torch.compile do: each call returns the same memory, which it clears first."""
    import torch

    memory = torch.zeros(2)

    def module(sample: Any, previous: Any) -> Any:
        memory.zero_()
        memory[0], memory[1] = sample + 1, previous + 1
        return memory[0], memory[1], None

    last = gpu_step.stepped(module, {"sample": torch.zeros(()), "previous": torch.zeros(())}, 3)

    assert last == 3


def test_what_needs_a_gpu_is_measured_before_a_test_can_fail() -> None:
    """And TensorRT, whose libraries are on NVIDIA's index only, may be missing."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    lines = subprocess.run(["make", "--dry-run", "bench-gpu"], cwd=ROOT, capture_output=True, text=True, check=True)
    commands = ["cuda,train,dev]", "tensorrt]' 2>", "-m benchmarks.gpu", "-m pytest"]

    positions = [lines.stdout.index(command) for command in commands]

    assert positions == sorted(positions)


def test_a_stage_is_not_started_when_the_time_is_over(options: Namespace) -> None:
    options.minutes = 0

    stored = gpu.run(gpu.plan(["tiny"]), ["arrays"], options)

    assert stored["arrays"]["error"] == "not started: the 0 minutes are over"


@pytest.mark.parametrize(
    ("program", "seconds", "result"),
    [
        ("print('noise'); print('{\"a\": 1}')", 60, {"a": 1}),
        ("raise SystemExit('a line')", 60, {"error": "a line"}),
        ("import os; os._exit(3)", 60, {"error": "it ended without a message, status 3"}),
        ("import time; time.sleep(60)", 1, {"error": "stopped after 1 s"}),
    ],
)
def test_a_process_ends_in_its_result_or_in_one_line(program: str, seconds: float, result: dict[str, Any]) -> None:
    assert finished([sys.executable, "-c", program], seconds) == result


@pytest.mark.parametrize("batch", [1, 3])
def test_the_inputs_of_a_step_have_one_size_for_each_axis(batch: int) -> None:
    from benchmarks.architectures import full_size

    feeds, sizes = feeds_of("tiny", batch), dict[str, int]()
    specs = full_size("tiny", "fp32").inputs

    assert feeds.keys() == {spec.name for spec in specs}
    for spec in specs:
        assert feeds[spec.name].dtype == spec.dtype.value
        for axis, size in zip(spec.axes, feeds[spec.name].shape, strict=True):
            assert size == (sizes.setdefault(axis, size) if isinstance(axis, str) else axis)
    assert sizes == {"B": batch, "N": 2 * batch, "M": 2 * batch, "T": 77, "h": 64, "w": 64}
    for row in range(batch):  # as Arena lays out guided rows
        branches = [feeds["uncond_branch"][row], feeds["cond_branch"][row]]
        assert feeds["branch_row"][branches].tolist() == [row, row]


@pytest.mark.parametrize(("device", "text"), [("NVIDIA H200", "| **7.00** | 6.50 |"), ("NVIDIA L4", "| 7.00 | 6.50 |")])
def test_a_step_that_misses_its_goal_is_bold_on_the_card_that_has_one(device: str, text: str) -> None:
    """6.5 ms a step are 0.325 s for 50 steps, and 1.607 TFLOP in 6.5 ms are 247 TFLOP/s."""
    results = {
        "torch": {"error": "no room"},
        "onnxruntime-cuda": {"step_ms": 7.0, "captured_ms": 6.5, "difference": 1e-3, "gpu_mib": 2000.0},
    }

    table = latency_table("sd15", 1, results, device)

    assert f"| onnxruntime-cuda {text} 0.33 | 247 | 1.0e-03 | 2000 |" in table
    assert "| torch | no room |  |  |  |  |  |" in table


def test_the_tuned_step_of_diffusers_is_the_step_of_the_others() -> None:
    """Three pictures, each with its prompts, by diffusers' own UNet with fused projections."""
    import torch

    from benchmarks.architectures import full_size
    from benchmarks.gpu_step import tuned_step
    from oneword.export.eager import to_torch

    graph = full_size("tiny", "fp32")
    feeds = feeds_of("tiny", 3)
    feeds["sample"] = feeds["sample"][..., :16, :16]
    for name in ("previous", "previous2", "noise", "known", "known_noise", "mask"):
        feeds[name] = feeds[name][..., :16, :16]
    tensors = to_torch(graph.inputs, feeds)
    with torch.no_grad():
        expected = graph.module(**tensors)[0]
        tuned = tuned_step(graph.module.network.unet)
        actual = tuned(**tensors)[0]

    assert [name for name, _ in tuned.named_modules() if name.endswith("to_qkv")]  # fused
    assert (expected - tensors["sample"]).abs().max() > 0.02  # what the network adds
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_diffusers_with_the_settings_of_stable_fast_ends_in_one_line_without_a_gpu(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    command = [sys.executable, "-m", "benchmarks.gpu_step", "diffusers-tuned", "tiny", "1", str(tmp_path)]

    result = finished(command, 300)

    assert result.keys() == {"error"}
    assert re.fullmatch(r"PyTorch \S+ finds no GPU", result["error"])


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    runtime = Runtime()
    monkeypatch.setattr("oneword.engines.cuda._runtime", lambda: runtime)
    gpu_stream.cache_clear()
    yield runtime
    gpu_stream.cache_clear()
    assert runtime.violations == []


def settings(tmp_path: Path) -> Settings:
    return Settings(tmp_path, tmp_path / "bundle", None, 60, simulated=True)


@pytest.mark.usefixtures("simulated")
def test_arrays_are_checked_and_timed(tmp_path: Path) -> None:
    result = gpu_stages.arrays(settings(tmp_path))

    assert result["device"] == "Simulated"
    assert result["checks"] == 4 * (1 + 6 * 2 + 2) + 3
    assert {name for name in result if name.startswith("GB/s")} == {
        "GB/s to the device", "GB/s to the host", "GB/s on the device"
    }  # fmt: skip


def test_the_layers_of_a_plan_are_counted_with_and_without_details() -> None:
    names = ["conv_1", "__myl_FcMha_2", "attention_fused_3"]
    details = [{"Name": name, "LayerType": "kgen"} for name in names]

    for layers in (names, details):
        report = json.dumps({"Layers": layers, "Bindings": []})
        assert gpu_stages.layers_of(report) == {"layers of a step": 3, "fused attentions": 2}


def test_an_array_that_differs_from_the_host_fails_in_one_line(
    simulated: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oneword.engines.cuda.DeviceArray.numpy", lambda array: np.full(array.shape, 7))

    with pytest.raises(SystemExit, match="a copy of float32 differs from the host"):
        gpu_stages.arrays(settings(tmp_path))


def test_every_stage_of_a_small_model_runs_on_simulated_cuda_or_says_in_one_line_why_not(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    stages = ["arrays", "cuda", "tensorrt", "tensorrt-rtx", "replays", "swaps", "learning"]
    command = [sys.executable, "-m", "benchmarks.gpu", *stages, "--simulated", "--bundle", tiny_bundle]
    run = subprocess.run([*command, "--work", tmp_path], capture_output=True, text=True)

    assert run.returncode == 0, run.stderr
    *lines, summary = map(json.loads, run.stdout.splitlines())
    entries = {line["stage"]: line for line in lines}
    failed = ["tensorrt", "tensorrt-rtx", "learning"]
    assert summary == {"succeeded": ["arrays", "cuda", "swaps"], "incomplete": ["replays"], "failed": failed}
    cuda = entries["cuda"]["result"]
    assert (cuda["pictures"], cuda["identical"]) == (5, 5)  # both compute on the CPU
    replayed = entries["replays"]["result"]
    assert replayed["onnxruntime-cuda"]["share replayed"] == 1  # after the warm-up
    assert "error" in replayed["tensorrt"]
    swapped = entries["swaps"]["result"]
    assert (swapped["words loaded"], swapped["last word, dB"]) == (40, 99)
    assert "--script" in entries["learning"]["error"]
    assert not any("\n" in entries[name]["error"] for name in failed)
    assert "pip install" in entries["tensorrt"]["error"]


@pytest.mark.slow
def test_the_stages_of_full_size_run_on_simulated_cuda_with_a_toy_model(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "tiny-export", "tiny-1", "tiny-4", "tiny-8", "--simulated"]
    run = subprocess.run([*command, "--work", tmp_path], capture_output=True, text=True)

    *lines, summary = map(json.loads, run.stdout.splitlines())
    incomplete = ["tiny-1", "tiny-4", "tiny-8"]
    assert summary == {"succeeded": ["tiny-export"], "incomplete": incomplete, "failed": []}
    for line in lines[1:]:
        assert line["result"]["onnxruntime-cuda"]["captured_ms"] > 0
        assert "finds no GPU" in line["result"]["torch"]["error"]
