"""How long a picture takes: ours beside what people use, on one model, in one call.

    python -m benchmarks.latency [--model miniature|DIR] [--bundle DIR] [--steps N] [--rounds N] [--plot FILE]

Contenders, each in a process of its own, in turn, `--rounds` times over; the medians are reported:

    ours-onnxruntime    the runtime of this project, ONNX Runtime, fp32
    ours-openvino       the same, OpenVINO, bf16 where the processor has it
    diffusers           StableDiffusionPipeline, eager, fp32
    diffusers-compile   the same with torch.compile on its UNet
    diffusers-openvino  the same with its UNet converted by OpenVINO, bf16 where the processor has it

Columns: ms a step and a picture (after two warm-up pictures; a picture is text to pixels in memory), what the loop adds
to the bare engine in each step, seconds from process start to a PNG on disk, peak memory. Every contender gets the same
number of threads. Not here: quality, and anything with a GPU.
"""

import argparse
import importlib.resources
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CONTENDERS = ("ours-onnxruntime", "ours-openvino", "diffusers", "diffusers-compile", "diffusers-openvino")
PROMPT = "a photo of a red star"
GUIDANCE = 5.0
SEED = 7
WARM_UP = 2


def main() -> None:
    """Runs all contenders, prints a table and one JSON line."""
    options = _options()
    if options.cold:
        _draw(_pipeline(options.model, options.contender), options).save(options.cold)
        return
    if options.contender:
        print(json.dumps(_measure(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder) / "inductor")  # nobody else's, and empty at first
        options.model = _model(options.model)
        if options.bundle is None:
            options.bundle = Path(folder) / "bundle"
            _run("-m", "oneword.export.cli", options.model, options.bundle)
        rounds = [{name: _contend(name, options, Path(folder)) for name in CONTENDERS} for _ in range(options.rounds)]
    results = {name: _medians([each[name] for each in rounds]) for name in CONTENDERS}
    _print_table(results)
    if options.plot:
        _plot(results, options.plot)
    print(json.dumps({"steps": options.steps, "size": options.size, "threads": options.threads, "results": results}))


def _measure(options: argparse.Namespace) -> dict[str, float]:
    """In a contender's own process: seconds a picture and a step, overhead a step, peak memory."""
    draw, step_seconds = (_ours if options.contender.startswith("ours") else _diffusers)(options)
    for _ in range(WARM_UP):
        draw()
    pictures, steps = [], []
    for _ in range(options.pictures):
        start = time.perf_counter()
        draw()
        pictures.append(time.perf_counter() - start)
        steps.append(step_seconds())
    step, bare = (statistics.median(each) for each in zip(*steps, strict=True))
    return {
        "picture_ms": 1e3 * statistics.median(pictures),
        "step_ms": 1e3 * step,
        "overhead_ms": 1e3 * (step - bare),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _ours(options: argparse.Namespace) -> tuple[Callable[[], object], Callable[[], tuple[float, float]]]:
    from oneword.engines.open import Backend
    from oneword.runtime.batch import Batch
    from oneword.runtime.model import Model
    from oneword.runtime.request import Request

    model = Model.open(options.bundle, Backend(options.contender.removeprefix("ours-")), options.threads)
    size = (options.size, options.size)
    request = Request(PROMPT, seed=SEED, steps=options.steps, guidance_scale=GUIDANCE, size=size)
    last: list[Batch] = []

    def draw() -> None:
        batch = Batch(model)
        batch.add(request)
        while batch:
            batch.step()
        last[:] = [batch]

    def step_seconds() -> tuple[float, float]:
        binding = next(reversed(model._bindings.values())).binding
        start = time.perf_counter()
        for _ in range(options.steps):
            binding.run()
        return last[0].seconds["denoise"] / options.steps, (time.perf_counter() - start) / options.steps

    return draw, step_seconds


def _diffusers(options: argparse.Namespace) -> tuple[Callable[[], object], Callable[[], tuple[float, float]]]:
    """Steps are timed from callback to callback; the bare engine is the UNet's own time within them."""
    import torch

    torch.set_num_threads(options.threads)
    pipeline = _pipeline(options.model, options.contender)
    forward = pipeline.unet.forward
    spent: list[float] = []
    ends: list[float] = []

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = forward(*args, **kwargs)
        spent.append(time.perf_counter() - start)
        return result

    pipeline.unet.forward = timed

    def draw() -> object:
        ends.clear()
        spent.clear()
        return _draw(pipeline, options, callback_on_step_end=lambda p, i, t, k: ends.append(time.perf_counter()) or k)

    def step_seconds() -> tuple[float, float]:
        return (ends[-1] - ends[0]) / (len(ends) - 1), statistics.mean(spent[1:])

    return draw, step_seconds


def _pipeline(model: Path, contender: str) -> Any:
    import torch
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    if contender == "diffusers-compile":
        pipeline.unet.forward = torch.compile(pipeline.unet.forward)
    if contender == "diffusers-openvino":
        pipeline.unet.forward = _openvino_unet(pipeline)
    return pipeline


def _openvino_unet(pipeline: Any) -> Callable[..., Any]:
    import openvino
    import torch

    unet, length = pipeline.unet, pipeline.tokenizer.model_max_length
    side = unet.config.sample_size
    example = {
        "sample": torch.zeros(2, unet.config.in_channels, side, side),
        "timestep": torch.tensor(1),
        "encoder_hidden_states": torch.zeros(2, length, unet.config.cross_attention_dim),
    }
    core = openvino.Core()
    low = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if low else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
    }
    compiled = core.compile_model(openvino.convert_model(unet, example_input=example), "CPU", settings)

    def forward(sample: Any, timestep: Any, encoder_hidden_states: Any, **_: Any) -> Any:
        feeds = [sample.numpy(), timestep.numpy(), encoder_hidden_states.numpy()]
        return (torch.from_numpy(compiled(feeds)[0]),)

    return forward


def _draw(pipeline: Any, options: argparse.Namespace, **settings: Any) -> Any:
    import torch

    return pipeline(
        PROMPT,
        num_inference_steps=options.steps,
        guidance_scale=GUIDANCE,
        width=options.size,
        height=options.size,
        generator=torch.Generator().manual_seed(SEED),
        **settings,
    ).images[0]


def _contend(name: str, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    shared = ["--model", options.model, "--bundle", options.bundle, "--size", options.size, "--steps", options.steps]
    shared += ["--threads", options.threads, "--pictures", options.pictures]
    measured: dict[str, float] = json.loads(_run("-m", "benchmarks.latency", "--contender", name, *shared))
    start = time.perf_counter()
    if name.startswith("ours"):
        line = ["--steps", options.steps, "--seed", SEED, "--guidance-scale", GUIDANCE, "--output", folder / name]
        line += ["--size", f"{options.size}x{options.size}", "--engine", name.removeprefix("ours-")]
        _run("-m", "oneword.runtime.cli", options.bundle, PROMPT, *line)
    else:
        _run("-m", "benchmarks.latency", "--contender", name, *shared, "--cold", folder / f"{name}.png")
    measured["cold_s"] = time.perf_counter() - start
    print(f"{name}: {measured['picture_ms']:.0f} ms a picture", file=sys.stderr)
    return measured


def _run(*line: object) -> str:
    threads = str(len(os.sched_getaffinity(0)))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, line)],
        env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.strip().rpartition("\n")[2]


def _model(name: str) -> Path:
    if name == "miniature":
        return Path(str(importlib.resources.files("oneword") / "miniature"))
    return Path(name)


def _medians(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(each[key] for each in rounds), 3) for key in rounds[0]}


def _print_table(results: dict[str, dict[str, float]]) -> None:
    base = results["diffusers"]
    titles = ("ms/picture", "faster", "ms/step", "overhead", "cold start s", "faster", "peak MiB")
    print(" " * 20 + "".join(f"{title:>14}" for title in titles))
    for name, each in results.items():
        faster, colder = base["picture_ms"] / each["picture_ms"], base["cold_s"] / each["cold_s"]
        numbers = f"{each['picture_ms']:14.1f}{faster:13.2f}x{each['step_ms']:14.2f}{each['overhead_ms']:14.2f}"
        print(f"{name:20}{numbers}{each['cold_s']:14.2f}{colder:13.2f}x{each['peak_mib']:14.0f}")


def _plot(results: dict[str, dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3), sharey=True, layout="constrained")
    names = list(results)[::-1]
    colours = ["#c0392b" if name.startswith("ours") else "#7f8c8d" for name in names]
    for axes, key, title in ((left, "picture_ms", "a picture, ms"), (right, "cold_s", "process start to PNG, s")):
        bars = axes.barh(names, [results[name][key] for name in names], color=colours)
        axes.bar_label(bars, fmt="%.3g", padding=3)
        axes.set_title(title)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.15)
    figure.savefig(path, dpi=150)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="miniature", help="miniature or a diffusers directory")
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pictures", type=int, default=5, help="timed in each process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--plot", type=Path, help="write a plot here")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--bundle", type=Path, help="the model, exported; else it is exported first")
    parser.add_argument("--cold", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
