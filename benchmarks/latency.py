"""How long a picture takes: ours beside what people use, on the same models, in one call.

    python -m benchmarks.latency                      both models; writes docs/latency.md and docs/latency.png
    python -m benchmarks.latency --models miniature   one of them, printed only
    python -m benchmarks.latency --quick              a few steps of each contender, to see that all run

Contenders, each in a process of its own, in turn; medians are reported, of three rounds for the miniature and of one of
two pictures for SD 1.5:

    ours-onnxruntime    the runtime of this project, ONNX Runtime, fp32
    ours-openvino       the same, OpenVINO, bf16 where the processor has it
    diffusers           StableDiffusionPipeline, eager, fp32
    diffusers-compile   the same with torch.compile on its UNet
    diffusers-openvino  the same with its UNet in OpenVINO, compiled for the one shape, bf16 where the processor has it

Models: the miniature at 64x64, 20 steps; and SD 1.5's architecture with random weights at 256x256, 4 steps. A picture
is text to pixels in memory, every one of another prompt. A step is timed in the loop, and the bare engine within it:
the rest is the host's. Cold is from process start to a PNG on disk, with the files in the system's cache and what each
contender keeps on disk (OpenVINO's plans, Inductor's kernels) made before. All get the same warm-up and threads.

What is done is kept in `--work` and not done again: stop it, and run the same line to go on. Not here: quality, GPUs.
"""

import argparse
import importlib.resources
import importlib.util
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from oneword.engines.files import write_whole

CONTENDERS = {  # and the packages that each needs
    "ours-onnxruntime": ("onnxruntime",),
    "ours-openvino": ("openvino",),
    "diffusers": ("torch", "diffusers"),
    "diffusers-compile": ("torch", "diffusers"),
    "diffusers-openvino": ("torch", "diffusers", "openvino"),
}
COLOURS = ("red", "blue", "green", "yellow", "purple", "orange", "white", "black")
SHAPES = ("star", "ring", "heart", "moon", "square", "cross")
PROMPTS = [f"a photo of a {colour} {shape}" for shape in SHAPES for colour in COLOURS]
GUIDANCE = 5.0
SEED = 7

KEYS = {"picture_ms": "time a picture", "step_ms": "time a step", "cold_s": "cold start", "peak_mib": "peak memory"}

Result = dict[str, float]


@dataclass(frozen=True)
class Case:
    """A model and how it is timed."""

    name: str
    title: str
    size: int
    steps: int
    warm_up: int
    pictures: int
    rounds: int


CASES = {
    "miniature": Case("miniature", "The miniature, 64x64, 20 steps", 64, 20, 6, 10, 3),
    "sd15": Case("sd15", "SD 1.5's architecture, random weights, 256x256, 4 steps", 256, 4, 1, 2, 1),
}


def main() -> None:
    """Runs what has not been run, prints tables and one JSON line; with both models writes the page."""
    options = _options()
    cases = {name: CASES[name] for name in options.models}
    if options.quick:
        options.work = options.work / "quick"
        if not options.contender:
            shutil.rmtree(options.work, ignore_errors=True)
        cases = {
            name: replace(case, steps=2, warm_up=1, pictures=1, rounds=1, title=f"{case.title}: quick, no measurement")
            for name, case in cases.items()
        }
    if options.contender:
        [case] = cases.values()
        contend(case, options)
        return
    absent = {name: [p for p in needs if not importlib.util.find_spec(p)] for name, needs in CONTENDERS.items()}
    for name, packages in absent.items():
        if packages:
            print(f"{name} is left out: {', '.join(packages)} not installed", file=sys.stderr)
    contenders = [name for name, packages in absent.items() if not packages]
    results = {name: _medians(run(case, contenders, options)) for name, case in cases.items()}
    for name, case in cases.items():
        print(f"\n{case.title}\n{table(results[name])}\n")
        print("\n".join(bars(name, results[name])))
    if list(cases) == list(CASES) and not options.quick:
        plot(results, options.output / "latency.png")
        (options.output / "latency.md").write_text(page(results, options), encoding="utf-8")
    print(json.dumps({"threads": options.threads, "results": results}))


def run(case: Case, contenders: Sequence[str], options: argparse.Namespace) -> list[dict[str, Result]]:
    """Every contender in turn, as often as the case says; what the file of results holds is not run again."""
    folder = options.work / case.name
    folder.mkdir(parents=True, exist_ok=True)
    model, bundle = prepare(case, folder)
    file = folder / "results.json"
    kept: dict[str, Result] = json.loads(file.read_text()) if file.exists() else {}
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder.resolve() / "inductor")  # nobody else's, and empty at first
    rounds = []
    for number in range(case.rounds):
        for name in contenders:
            key = f"{number} {name} {case.steps} steps {options.threads} threads"
            if key not in kept:
                shared = ["--contender", name, "--models", case.name, "--threads", options.threads]
                shared += ["--model", model, "--bundle", bundle, *(["--quick"] if options.quick else [])]
                kept[key] = json.loads(_python("-m", "benchmarks.latency", *shared, threads=options.threads))
                kept[key]["cold_s"] = _cold(name, case, model, bundle, folder, shared, options.threads)
                write_whole(file, json.dumps(kept, indent=1).encode(), sync=False)
                print(f"{case.name}, {name}: {kept[key]['picture_ms']:.0f} ms a picture", file=sys.stderr)
        rounds.append({n: kept[f"{number} {n} {case.steps} steps {options.threads} threads"] for n in contenders})
    return rounds


def prepare(case: Case, folder: Path) -> tuple[Path, Path]:
    """The model as a diffusers directory, and its bundle."""
    if case.name == "miniature":
        model = Path(str(importlib.resources.files("oneword") / "miniature"))
    else:
        model = folder / "model"
        if not (model / "model_index.json").is_file():
            _python("-c", f"from benchmarks.latency import random_sd15; random_sd15({str(model)!r})", threads=0)
    bundle = folder / "bundle"
    # In a process of its own: it needs much memory.
    script = f"from pathlib import Path; from benchmarks.exported import exported; exported({str(model)!r}, Path("
    _python("-c", f"{script}{str(bundle)!r}))", threads=0)
    return model, bundle


def random_sd15(path: str) -> None:
    """Saves a pipeline of SD 1.5's architecture, 1.07 billion random parameters, with the miniature's tokenizer."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    miniature = importlib.resources.files("oneword") / "miniature"
    tokenizer = CLIPTokenizer.from_pretrained(str(miniature / "tokenizer"), model_max_length=77)
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, **text, **ids)),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),  # its defaults
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(path)


def contend(case: Case, options: argparse.Namespace) -> None:
    """In a contender's own process: one picture to a file, or the measurements as JSON."""
    if options.cold:
        pipeline = _pipeline(options.model, options.contender, case)
        _draw(pipeline, case, PROMPTS[0]).save(options.cold)
        return
    contender = _ours if options.contender.startswith("ours") else _diffusers
    draw, step_seconds = contender(case, options)
    for prompt in PROMPTS[: case.warm_up]:
        draw(prompt)
    pictures, steps = [], []
    for prompt in PROMPTS[case.warm_up : case.warm_up + case.pictures]:
        start = time.perf_counter()
        draw(prompt)
        pictures.append(time.perf_counter() - start)
        steps.append(step_seconds())
    step, bare = (statistics.median(each) for each in zip(*steps, strict=True))
    result = {
        "picture_ms": 1e3 * statistics.median(pictures),
        "step_ms": 1e3 * step,
        "overhead_ms": 1e3 * (step - bare),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(result))


Draw = Callable[[str], object]
StepSeconds = Callable[[], tuple[float, float]]


def _ours(case: Case, options: argparse.Namespace) -> tuple[Draw, StepSeconds]:
    """The bare engine is timed within the loop: every call of the denoiser's binding."""
    from oneword.runtime.generate import scheduler_for
    from oneword.runtime.model import Model
    from oneword.runtime.request import Request

    model = Model.open(options.bundle, options.contender.removeprefix("ours-"), threads=options.threads)
    engine: Any = model.engine("denoise_step")
    bind, spent, ends = engine.bind, list[float](), list[float]()

    def timed_bind(*args: Any) -> Any:
        binding = bind(*args)
        run = binding.run

        def timed(stream: int | None = None) -> None:
            start = time.perf_counter()
            run(stream)
            spent.append(time.perf_counter() - start)

        binding.run = timed
        return binding

    engine.bind = timed_bind

    def draw(prompt: str) -> None:
        spent.clear()
        ends.clear()
        size = (case.size, case.size)
        request = Request(prompt, seed=SEED, steps=case.steps, guidance_scale=GUIDANCE, size=size)
        scheduler = scheduler_for(model, [request])
        while scheduler:
            scheduler.step()
            ends.append(time.perf_counter())

    def step_seconds() -> tuple[float, float]:  # the last step also decodes, the first also encodes
        if case.steps < 3:
            return statistics.mean(spent), statistics.mean(spent)
        return (ends[-2] - ends[0]) / (len(ends) - 2), statistics.mean(spent[1:-1])

    return draw, step_seconds


def _diffusers(case: Case, options: argparse.Namespace) -> tuple[Draw, StepSeconds]:
    """Steps are timed from callback to callback; the bare engine is the UNet's own time within them."""
    import torch

    torch.set_num_threads(options.threads)
    pipeline = _pipeline(options.model, options.contender, case)
    forward, spent, ends = pipeline.unet.forward, list[float](), list[float]()

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = forward(*args, **kwargs)
        spent.append(time.perf_counter() - start)
        return result

    pipeline.unet.forward = timed

    def ended(_pipeline: Any, _step: int, _time: Any, kwargs: Any) -> Any:
        ends.append(time.perf_counter())
        return kwargs

    def draw(prompt: str) -> object:
        ends.clear()
        spent.clear()
        return _draw(pipeline, case, prompt, callback_on_step_end=ended)

    def step_seconds() -> tuple[float, float]:
        return (ends[-1] - ends[0]) / (len(ends) - 1), statistics.mean(spent[1:])

    return draw, step_seconds


def _pipeline(model: Path, contender: str, case: Case) -> Any:
    import torch
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if contender == "diffusers-compile":
        pipeline.unet.forward = torch.compile(pipeline.unet.forward)
    if contender == "diffusers-openvino":
        pipeline.unet.forward = _openvino_unet(pipeline, case)
    return pipeline


def _openvino_unet(pipeline: Any, case: Case) -> Callable[..., Any]:
    import openvino
    import torch

    unet, length = pipeline.unet, pipeline.tokenizer.model_max_length
    side = case.size // pipeline.vae_scale_factor
    example = {
        "sample": torch.zeros(2, unet.config.in_channels, side, side),
        "timestep": torch.tensor(1),
        "encoder_hidden_states": torch.zeros(2, length, unet.config.cross_attention_dim),
    }
    core = openvino.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if _has_bfloat16() else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
    }
    graph = openvino.convert_model(unet, example_input=example)
    graph.reshape({i: list(value.shape) for i, value in enumerate(example.values())})
    compiled = core.compile_model(graph, "CPU", settings)

    def forward(sample: Any, timestep: Any, encoder_hidden_states: Any, **_: Any) -> Any:
        feeds = [sample.numpy(), timestep.numpy(), encoder_hidden_states.numpy()]
        return (torch.from_numpy(compiled(feeds)[0].copy()),)

    return forward


def _draw(pipeline: Any, case: Case, prompt: str, **settings: Any) -> Any:
    import torch

    return pipeline(
        prompt,
        num_inference_steps=case.steps,
        guidance_scale=GUIDANCE,
        width=case.size,
        height=case.size,
        generator=torch.Generator().manual_seed(SEED),
        **settings,
    ).images[0]


def _cold(
    name: str, case: Case, model: Path, bundle: Path, folder: Path, shared: Sequence[object], threads: int
) -> float:
    """Seconds from process start to a PNG: `ti-run`, or a diffusers script."""
    start = time.perf_counter()
    if name.startswith("ours"):
        line: list[object] = ["--steps", case.steps, "--seed", SEED, "--guidance-scale", GUIDANCE]
        line += ["--size", f"{case.size}x{case.size}", "--engine", name.removeprefix("ours-")]
        _python("-m", "oneword.runtime.cli", bundle, PROMPTS[0], *line, "--output", folder / name, threads=threads)
    else:
        _python("-m", "benchmarks.latency", *shared, "--cold", folder / f"{name}.png", threads=threads)
    return time.perf_counter() - start


def _python(*line: object, threads: int) -> str:
    """The last line of what a Python process prints; 0 threads leaves their number to it."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, line)],
        env={**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, line))[:300]} failed with {done.returncode}; what is done is kept")
    return done.stdout.strip().rpartition("\n")[2]


def _medians(rounds: Sequence[dict[str, Result]]) -> dict[str, Result]:
    return {
        name: {key: round(statistics.median(each[name][key] for each in rounds), 3) for key in rounds[0][name]}
        for name in rounds[0]
    }


def table(results: Mapping[str, Result]) -> str:
    """One model's results in Markdown; `faster` is beside diffusers, eager."""
    lines = [
        "| | ms a picture | faster | ms a step | of it the host's | cold start, s | faster | peak MiB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    base = results.get("diffusers")
    for name, each in results.items():
        faster = f"{base['picture_ms'] / each['picture_ms']:.2f}x" if base else ""
        colder = f"{base['cold_s'] / each['cold_s']:.2f}x" if base else ""
        host = f"{each['overhead_ms']:.2f} ({each['overhead_ms'] / each['step_ms']:.1%})"
        lines.append(
            f"| {name} | {each['picture_ms']:.1f} | {faster} | {each['step_ms']:.2f} | {host} | "
            f"{each['cold_s']:.2f} | {colder} | {each['peak_mib']:.0f} |"
        )
    return "\n".join(lines)


def bars(case: str, results: Mapping[str, Result]) -> list[str]:
    """What was aimed at, and what came of it; a peer that is better than ours in anything is named."""
    lines = []

    def bar(what: str, value: float, limit: float, *, least: bool) -> None:
        met = value >= limit if least else value <= limit
        lines.append(f"- {'met' if met else '**missed**'}: {what}: {value:.3g}, bar {limit:g}")

    base = results.get("diffusers")
    for name, times in (("ours-onnxruntime", 1.8), ("ours-openvino", 2.5)):
        if (ours := results.get(name)) is None:
            continue
        if base and case == "miniature":
            quotient = base["picture_ms"] / ours["picture_ms"]
            bar(f"{name}, times faster than diffusers, a picture", quotient, times, least=True)
        if base:
            bar(f"{name}, cold start over diffusers'", ours["cold_s"] / base["cold_s"], 0.25, least=False)
        bar(f"{name}, the host's share of a step", ours["overhead_ms"] / ours["step_ms"], 0.03, least=False)
        if name == "ours-openvino" and (bare := results.get("diffusers-openvino")):
            own = bare["step_ms"] - bare["overhead_ms"]
            bar(
                f"{name}, a step over the bare UNet's, compiled for one shape", ours["step_ms"] / own, 1.03, least=False
            )
        for peer, each in results.items():
            for key, what in KEYS.items():
                if not peer.startswith("ours") and each[key] < ours[key]:
                    lines.append(f"- {peer} needs less {what} than {name}, which takes {ours[key] / each[key]:.2f}x")
    return lines


def plot(results: Mapping[str, Mapping[str, Result]], path: Path) -> None:
    """A picture and a cold start of each contender, a row of panels for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(len(results), 2, figsize=(10, 3 * len(results)), layout="constrained", squeeze=False)
    for axes_row, (case, each) in zip(rows, results.items(), strict=True):
        names = list(each)[::-1]
        colours = ["#c0392b" if name.startswith("ours") else "#7f8c8d" for name in names]
        for axes, key, title in zip(
            axes_row, ("picture_ms", "cold_s"), ("a picture, ms", "cold start, s"), strict=True
        ):
            bars_drawn = axes.barh(names, [each[name][key] for name in names], color=colours)
            axes.bar_label(
                bars_drawn, fmt=lambda value: f"{value:,.0f}" if value >= 1000 else f"{value:.3g}", padding=3
            )
            axes.set_title(f"{case}: {title}")
            axes.spines[["top", "right"]].set_visible(False)
            axes.margins(x=0.15)
            axes.locator_params(axis="x", nbins=5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def page(results: Mapping[str, Mapping[str, Result]], options: argparse.Namespace) -> str:
    """docs/latency.md."""
    from importlib.metadata import version

    packages = ("torch", "diffusers", "onnxruntime", "openvino")
    versions = ", ".join(f"{name} {version(name)}" for name in packages if importlib.util.find_spec(name))
    openvino = f"OpenVINO computes in {'bfloat16' if _has_bfloat16() else 'float32'}"
    python = f"Python {platform.python_version()}"
    machine = f"{_processor()}, on which {openvino}, {options.threads} threads, {python}, {versions}"
    parts = [
        "# Latency\n\nWhat a picture takes beside diffusers, torch.compile and OpenVINO. Made by\n\n"
        "    python -m benchmarks.latency\n\nwhose docstring says what is measured and how; every contender runs in a "
        "process of its own, in turn, with the same warm-up and threads, every picture of another prompt; medians, of "
        "three rounds for the miniature, of one round of two pictures for SD 1.5.\n\n"
        f"Machine: {machine}.\n\n![a picture and a cold start of each contender](latency.png)"
    ]
    for name, each in results.items():
        parts.append(f"## {CASES[name].title}\n\n{table(each)}\n\n" + "\n".join(bars(name, each)))
    return "\n\n".join(parts) + "\n"


def _has_bfloat16() -> bool:
    """Whether OpenVINO takes bfloat16 here; without OpenVINO it does not matter."""
    if not importlib.util.find_spec("openvino"):
        return False
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--quick", action="store_true", help="two steps of each: does everything run?")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, default=Path("build/latency"), help="models, bundles and results")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="where the page and its plot are written")
    for name in ("--contender", "--model", "--bundle", "--cold"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
