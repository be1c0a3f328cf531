"""A guided denoise step on an NVIDIA GPU: this project's engines beside PyTorch, with the same weights.

    python -m benchmarks.gpu [tiny sd15 sdxl ...] [--steps N] [--rounds N] [--write]

    torch              the step's own module, fp16, channels last
    torch-compile      the same with torch.compile(mode="max-autotune")
    onnxruntime-cuda, tensorrt, tensorrt-rtx
                       the exported step, fp16; where the engine allows it, also captured as a CUDA graph and replayed

Random weights of full size (benchmarks.architectures), one picture with guidance, at the model's own size. Contenders
run one after another, each in its own process, `--rounds` times; medians are reported. Columns: ms per step (queued one
by one, and captured), TFLOP/s if the step's arithmetic is known, the largest relative difference from `torch` after one
step, and memory in use on the GPU. A contender that is not installed or does not run on this GPU gets a row with the
reason. `--write` puts the tables into docs/results/gpu.md. Ends in one line of JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.architectures import CONFIGS, SHAPE, bundle_of_one, full_size
from benchmarks.full_size import NEW_PAGE, PAGE
from benchmarks.pages import provenance, table, write_section
from oneword.runtime.samplers import COLUMNS

CONTENDERS = ("torch", "torch-compile", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx")
TFLOP = {"sd15": 1.607, "sdxl": 13.5}  # per guided step at the model's own size, counted over the network
TOKENS = SHAPE["T"]


def main() -> None:
    """Runs every contender on every model; prints a table per model and one line of JSON."""
    options = _options()
    if options.contender:
        print(json.dumps(_measure(options)))
        return
    results: dict[str, dict[str, Any]] = {}
    for model in options.models:
        with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
            rounds = [
                {name: _contend(name, model, folder, options) for name in CONTENDERS} for _ in range(options.rounds)
            ]
        results[model] = {name: _median([results_of_round[name] for results_of_round in rounds]) for name in CONTENDERS}
        print(_table(model, results[model]), flush=True)
    if options.write:
        tables = [_table(model, by_contender) for model, by_contender in results.items()]
        text = "\n\n".join([provenance("gpu", device=_gpu()), *tables])
        write_section(PAGE, "gpu-latency", text, NEW_PAGE)
    print(json.dumps({"steps": options.steps, "rounds": options.rounds, "results": results}))


def _contend(name: str, model: str, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """A contender's measurements, or its last line of output if it failed."""
    command = [sys.executable, "-m", "benchmarks.gpu", model, "--contender", name, "--scratch", folder]
    run = subprocess.run([*command, "--steps", str(options.steps)], capture_output=True, text=True)
    if run.returncode:
        return {"error": (run.stderr.strip().splitlines() or ["it ended without a message"])[-1][:200]}
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs in a contender's own process. PyTorch runs first and saves the reference for the others."""
    model, folder = options.models[0], Path(options.scratch)
    feeds = _feeds(model)
    contend = _torch if options.contender.startswith("torch") else _ours
    first_step, loop, captured, device_memory = contend(options.contender, model, folder, feeds, options.steps)
    result = {"step_ms": 1e3 * _seconds(loop) / options.steps, "gpu_mib": device_memory() / 2**20}
    if captured is not None:
        result["loop_ms"] = 1e3 * _seconds(captured) / options.steps
    reference = folder / "reference.npy"
    if options.contender == "torch":
        np.save(reference, first_step)
    expected = np.load(reference)
    result["difference"] = float(np.abs(first_step - expected).max() / np.abs(expected).max())
    return result


def _torch(contender: str, model: str, folder: Path, feeds: dict[str, Any], steps: int) -> Any:
    import torch

    from oneword.export.trace import to_torch

    graph = full_size(model, "fp16")
    module = graph.module.to("cuda", memory_format=torch.channels_last)
    if contender == "torch-compile":
        module = torch.compile(module, mode="max-autotune")
    tensors = {name: value.cuda() for name, value in to_torch(graph.inputs, feeds).items()}

    def loop(count: int = steps) -> Any:
        inputs = dict(tensors)
        with torch.no_grad():
            for _ in range(count):
                inputs["sample"], inputs["previous"], _ = module(**inputs)
        torch.cuda.synchronize()
        return inputs["sample"]

    free_and_total = torch.cuda.mem_get_info
    return loop(1).cpu().numpy(), loop, None, lambda: free_and_total()[1] - free_and_total()[0]


def _ours(contender: str, model: str, folder: Path, feeds: dict[str, Any], steps: int) -> Any:
    from oneword.engines.open import Backend, EngineOptions, gpu_stream, open_engine
    from oneword.runtime.profiles import DEFAULT_LIMITS, graph_ranges

    stream = gpu_stream()  # before the long work, since there may be no GPU
    bundle = bundle_of_one(model, "fp16", folder)
    options = EngineOptions(ranges=graph_ranges(bundle.manifest, "denoise_step", DEFAULT_LIMITS))
    engine = open_engine(Backend(contender), "denoise_step", bundle.graph("denoise_step"), folder, options)
    binding = engine.bind({name: value.shape for name, value in feeds.items()})

    def start() -> None:
        for name, value in feeds.items():
            binding.inputs[name].write(..., value)

    def step() -> None:
        stream.run(binding)
        stream.copy(binding.inputs["previous2"], binding.inputs["previous"])
        stream.copy(binding.inputs["previous"], binding.outputs["denoised"])
        stream.copy(binding.inputs["sample"], binding.outputs["next_sample"])

    def loop(queue_step: Callable[[], None]) -> None:
        start()
        for _ in range(steps):
            queue_step()
        stream.wait()

    start()
    step()
    first = binding.inputs["sample"].numpy()
    if not binding.capturable:
        return first, lambda: loop(step), None, stream.memory_in_use
    loop(step)
    replay = stream.capture(step)
    return first, lambda: loop(step), lambda: loop(replay), stream.memory_in_use


def _feeds(model: str) -> dict[str, Any]:
    """One guided picture of the model's own size, at a step that keeps the state near unit variance."""
    config = CONFIGS[model]
    side, random = int(config["sample_size"]), np.random.default_rng(0)
    latents = (1, 4, side, side)
    zeros = {name: np.zeros(latents, np.float32) for name in ("previous", "previous2", "noise", "known", "known_noise")}
    values = {
        "t": 500,
        "sample_to_denoised": 1,
        "model_to_denoised": -0.1,
        "sample": 0.9,
        "denoised": 0.1,
        "guidance": 5,
    }
    schedule = np.array([[values.get(name, 0) for name in COLUMNS if name != "embedded_guidance"]], np.float32)
    feeds = {
        "sample": random.standard_normal(latents, np.float32),
        **zeros,
        "mask": np.ones((1, 1, side, side), np.float32),
        "schedule": schedule,
        "branch_row": np.zeros(2, np.int64),
        "branch_context": np.tile(np.arange(2)[:, None, None], (1, 2, _layers(config))),
        "uncond_branch": np.zeros(1, np.int64),
        "cond_branch": np.ones(1, np.int64),
        "context": random.standard_normal((2, TOKENS, config["cross_attention_dim"]), np.float32),
    }
    if "addition_embed_type" in config:
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        feeds["branch_pooled"] = np.arange(2)
        feeds["pooled"] = random.standard_normal((2, pooled), np.float32)
        feeds["time_ids"] = np.array([[8 * side, 8 * side, 0, 0, 8 * side, 8 * side]], np.float32)
    return feeds


def _layers(config: dict[str, Any]) -> int:
    """L, the transformers of a UNet: `count` per down block, one more per up block, and one in the middle."""
    down = config.get("down_block_types", ("CrossAttnDownBlock2D",) * 3)
    up = config.get("up_block_types", ("CrossAttnUpBlock2D",) * 3)
    count = int(config.get("layers_per_block", 2))
    return sum(count for name in down if "Cross" in name) + 1 + sum(count + 1 for name in up if "Cross" in name)


def _seconds(work: Callable[[], object]) -> float:
    """The median of five runs, after two to warm up."""
    times = []
    for _ in range(7):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def _median(results: list[dict[str, Any]]) -> dict[str, Any]:
    if failed := [result for result in results if "error" in result]:
        return failed[0]
    return {key: statistics.median(result[key] for result in results) for key in results[0]}


def _gpu() -> str:
    """The GPU's name, by nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "no GPU"


def _table(model: str, results: dict[str, Any]) -> str:
    rows = []
    for name, r in results.items():
        if "error" in r:
            rows.append([name, r["error"], "", "", "", ""])
            continue
        best = min(r["step_ms"], r.get("loop_ms", r["step_ms"]))
        speed = f"{1e3 * TFLOP[model] / best:.0f}" if model in TFLOP else ""
        loop = f"{r['loop_ms']:.2f}" if "loop_ms" in r else ""
        rows.append([name, f"{r['step_ms']:.2f}", loop, speed, f"{r['difference']:.1e}", f"{r['gpu_mib']:.0f}"])
    return table([model, "ms per step", "captured", "TFLOP/s", "difference", "GPU MiB"], rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["tiny", "sd15", "sdxl"], metavar="tiny|sd15|sd2|sdxl|ldm")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write the tables into docs/results/gpu.md")
    parser.add_argument("--scratch", help="folder for temporary graphs and plans: 20 GB of free space")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
