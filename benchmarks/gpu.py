"""What an hour on an NVIDIA GPU should answer, in stages that do not depend on each other's success.

    python -m benchmarks.gpu [--script SCRIPT] [--write]     every stage, an hour at most
    python -m benchmarks.gpu arrays cuda sd15-1              these stages
    python -m benchmarks.gpu --simulated                     every stage without a GPU, on the tests' simulated CUDA

    arrays         device arrays, pinned memory and replays against numpy, and the speed of copies
    cuda           pictures of ONNX Runtime's CUDA provider beside the CPU's
    tensorrt, tensorrt-rtx    plans of every graph, and their pictures beside the CPU's
    replays        the share of steps that are replayed, and the GPU's gaps in a profiler's trace
    sd15-export, sdxl-export  the step of the architecture with random weights, in fp16
    sd15-1, sd15-4, sd15-8, sdxl-1, ...    a guided step at batch 1, 4 and 8 beside PyTorch, eager and compiled
                   (benchmarks.gpu_step)
    swaps          turns of a busy scheduler while words are loaded
    learning       seconds to learn a word beside SCRIPT, diffusers' textual_inversion.py

Each stage runs in its own process, is stopped at its limit, and ends in one line of JSON with its result or its error.
Results are stored in `--work`, and the same command resumes the plan: it runs again what has failed or had no time, and
in a stage that times a step only those contenders. `--write` writes docs/results/gpu.md from everything stored.
TensorRT-RTX does not build for every GPU, and TensorRT's libraries are not on PyPI: such a stage says so and counts as
failed. Ends in one line of JSON.
"""

import argparse
import datetime
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import gpu_stages, gpu_step
from benchmarks.architectures import CONFIGS
from benchmarks.full_size import NEW_PAGE, PAGE
from benchmarks.gpu_stages import Settings
from benchmarks.gpu_step import finished, latency_table
from benchmarks.pages import provenance, table, write_section
from oneword.engines.errors import OnewordError

BATCHES = (1, 4, 8)
MINUTES = 60.0
SLOWER = 5
"""How much longer a stage may take on simulated CUDA, which computes on the CPU."""
Stored = dict[str, dict[str, Any]]
"""By stage: `date`, `device`, `seconds`, and either `result` or `error`."""


@dataclass(frozen=True)
class Stage:
    """A part of the plan."""

    minutes: float
    """After which it is stopped."""
    run: Callable[[Settings], dict[str, Any]]


def plan(models: list[str]) -> dict[str, Stage]:
    """The stages by name, in their order; those of these models after the checks."""
    stages = {
        "arrays": Stage(1, gpu_stages.arrays),
        "cuda": Stage(2, gpu_stages.cuda),
        "tensorrt": Stage(4, gpu_stages.tensorrt),
        "tensorrt-rtx": Stage(2, gpu_stages.tensorrt_rtx),
        "replays": Stage(2, gpu_stages.replays),
    }
    for model in models:
        large = model == "sdxl"
        stages[f"{model}-export"] = Stage(6 if large else 3, partial(exported_step, model))
        for batch in BATCHES:
            minutes = (7 if batch == 1 else 3) + (2 if large else 0)
            stages[f"{model}-{batch}"] = Stage(minutes, partial(step_latency, model, batch))
    return {**stages, "swaps": Stage(2, gpu_stages.swaps), "learning": Stage(6, gpu_stages.learning)}


def exported_step(model: str, settings: Settings) -> dict[str, Any]:
    """See gpu_step.export."""
    return gpu_step.export(model, settings.work)


def step_latency(model: str, batch: int, settings: Settings) -> dict[str, Any]:
    """See gpu_step.contend."""
    entry = _stored(settings.work).get(f"{model}-{batch}", {})
    before = entry.get("result", {}) if entry.get("device") == _gpu(settings.simulated) else {}
    return gpu_step.contend(model, batch, settings.work, 0.95 * settings.seconds, settings.simulated, before)


def main() -> None:
    """Runs the stages that have not succeeded yet; prints a line of JSON after each, and one at the end."""
    options = _options()
    if options.child:
        print(json.dumps(in_this_process(options)))
        return
    stages = plan(options.models)
    if options.simulated:
        options.work = options.work / "simulated"
        shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True, exist_ok=True)
    stored = run(stages, options.stages or list(stages), options)
    if options.write:
        write(stored)
    failed = [name for name, entry in stored.items() if "error" in entry]
    succeeded = [name for name, entry in stored.items() if _complete(entry)]
    incomplete = [name for name in stored if name not in (*succeeded, *failed)]
    print(json.dumps({"succeeded": succeeded, "incomplete": incomplete, "failed": failed}))


def run(stages: Mapping[str, Stage], names: list[str], options: argparse.Namespace) -> Stored:
    """Runs these stages in turn, each in its own process, while there is time. Returns everything stored so far."""
    stored = _stored(options.work)
    end = time.monotonic() + 60 * options.minutes
    for name in names:
        before = stored.get(name, {})
        if _complete(before):
            continue
        start = time.monotonic()
        limit = min(60 * stages[name].minutes * (SLOWER if options.simulated else 1), end - start)
        entry: dict[str, Any] = {"date": str(datetime.date.today()), "device": _gpu(options.simulated)}
        if limit < 1 and before:
            break
        if limit < 1:
            entry["error"] = f"not started: the {options.minutes:g} minutes are over"
        else:
            finish = finished(_command(name, limit, options), limit + 10)
            entry |= finish if "error" in finish else {"result": finish}
        entry["seconds"] = round(time.monotonic() - start, 1)
        if "result" in entry or "result" not in before:
            stored[name] = entry
            _file(options.work).write_text(json.dumps(stored, indent=1))
        print(json.dumps({"stage": name, **entry}), flush=True)
    return stored


def _complete(entry: Mapping[str, Any]) -> bool:
    """Whether a stage has succeeded with all of its contenders."""
    return "result" in entry and not any(
        isinstance(part, Mapping) and "error" in part for part in entry["result"].values()
    )


def _stored(work: Path) -> Stored:
    file = _file(work)
    stored: Stored = json.loads(file.read_text()) if file.exists() else {}
    return stored


def _file(work: Path) -> Path:
    return work / "results.json"


def _command(name: str, limit: float, options: argparse.Namespace) -> list[str]:
    line: list[object] = [sys.executable, "-m", "benchmarks.gpu", name, "--child", limit, "--work", options.work]
    line += ["--models", *options.models]
    line += ["--bundle", options.bundle] if options.bundle else []
    line += ["--script", options.script] if options.script else []
    line += ["--simulated"] if options.simulated else []
    return [str(word) for word in line]


def in_this_process(options: argparse.Namespace) -> dict[str, Any]:
    """The result of one stage. Raises SystemExit with one line if it fails as this project fails."""
    [name] = options.stages
    if options.simulated:
        from benchmarks.simulated import simulate_cuda

        simulate_cuda()
    try:
        settings = Settings(options.work, bundle_of(options), options.script, float(options.child), options.simulated)
        return plan(options.models)[name].run(settings)
    except OnewordError as error:
        raise SystemExit(str(error)) from None


def bundle_of(options: argparse.Namespace) -> Path:
    """The small model's bundle in `work`, where plans are added to it; made when the first stage needs it."""
    bundle: Path = options.work / "bundle"
    if options.stages[0] in ("cuda", "tensorrt", "tensorrt-rtx", "replays", "swaps"):
        if options.bundle is None:
            from benchmarks.exported import exported  # takes seconds: imports PyTorch and diffusers

            return exported("miniature", bundle)
        if not bundle.exists():
            shutil.copytree(options.bundle, bundle)
    return bundle


def write(stored: Stored) -> None:
    """Writes docs/results/gpu.md: the stages, and the tables of latency."""
    device = next((entry["device"] for entry in stored.values() if "result" in entry), "no GPU")
    origin = provenance("gpu", device=device)
    write_section(PAGE, "gpu-plan", f"{origin}\n\n{stage_table(stored)}", NEW_PAGE)
    write_section(PAGE, "gpu-latency", f"{origin}\n\n{latency_tables(stored)}", NEW_PAGE)


def stage_table(stored: Stored) -> str:
    """Every stage but the latencies: what it measured, or why it failed."""
    rows = [
        [
            name,
            entry["date"],
            f"{entry['seconds']:.0f}",
            facts(entry["result"]) if "result" in entry else f"failed: {entry['error']}",
        ]
        for name, entry in stored.items()
        if "result" not in entry or _model_and_batch(name) is None
    ]
    return table(["stage", "date", "seconds", "result"], rows)


def latency_tables(stored: Stored) -> str:
    """The table of every model and batch that was measured."""
    tables = [
        latency_table(*measured, entry["result"], entry["device"])
        for name, entry in stored.items()
        if "result" in entry and (measured := _model_and_batch(name)) is not None
    ]
    return "\n\n".join(tables) or "Not measured yet: no GPU."


def facts(result: Mapping[str, Any]) -> str:
    """A result as one line: `checks 40; GB/s to the device 23.1`."""
    texts = [
        f"{name}: ({facts(value)})" if isinstance(value, Mapping) else f"{name} {value}"
        for name, value in result.items()
    ]
    return "; ".join(texts)


def _model_and_batch(stage: str) -> tuple[str, int] | None:
    model, _, batch = stage.rpartition("-")
    return (model, int(batch)) if model in CONFIGS and batch.isdigit() else None


def _gpu(simulated: bool) -> str:
    """The GPU's name and driver, by nvidia-smi."""
    if simulated:
        return "simulated CUDA"
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "no GPU"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="default: all")
    parser.add_argument("--models", nargs="+", choices=CONFIGS, help="default: sd15 sdxl; with --simulated: tiny")
    parser.add_argument("--bundle", type=Path, help="a small model instead of the miniature, exported")
    parser.add_argument("--script", type=Path, help="diffusers' textual_inversion.py, for the last stage")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time for all stages of this call")
    parser.add_argument("--simulated", action="store_true", help="on simulated CUDA, which computes on the CPU")
    parser.add_argument(
        "--work", type=Path, default=Path("build/gpu"), help="40 GB for weights, graphs, plans and results"
    )
    parser.add_argument("--write", action="store_true", help="write docs/results/gpu.md")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.models = options.models or (["tiny"] if options.simulated else ["sd15", "sdxl"])
    if unknown := [name for name in options.stages if name not in plan(options.models)]:
        parser.error(f"unknown stage {unknown[0]!r}: choose from {', '.join(plan(options.models))}")
    if options.write and options.simulated:
        parser.error("--write needs a GPU: leave out --simulated")
    return options


if __name__ == "__main__":
    main()
