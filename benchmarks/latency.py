"""Time per picture: ours beside diffusers, torch.compile, OpenVINO and stable-diffusion.cpp, on the same models.

    python -m benchmarks.latency                      the miniature, and SD 1.5's architecture at 256x256 in 4 steps
    python -m benchmarks.latency --write              also writes the page and its plot in docs/results/
    python -m benchmarks.latency --models sd15-512 sd15-20 sdxl    512x512, 20 steps, SDXL's architecture
    python -m benchmarks.latency --contenders oneword-openvino openvino-genai-static    some of the contenders
    python -m benchmarks.latency --quick              a few steps per contender, to check that all run

Contenders run one after another, each in its own process, in several rounds (CASES), whose medians are reported.

    oneword-onnxruntime this project's runtime, ONNX Runtime, fp32
    oneword-openvino    the same, OpenVINO, bf16 if the processor has it
    oneword-onnxruntime-int8, oneword-openvino-int8    the same with int8 weights
    diffusers           StableDiffusionPipeline, eager, fp32
    diffusers-compile   the same with torch.compile on its UNet
    diffusers-openvino  the same with its UNet in OpenVINO, compiled for one shape, bf16 if the processor has it
    openvino-genai-static   Text2ImagePipeline of OpenVINO GenAI, fp16 weights, compiled for one size, bf16 as above
    openvino-genai-dynamic  the same, compiled for any size
    optimum-intel           diffusers' pipeline with every network in OpenVINO, fp16 weights, compiled for one size
    sdcpp-f16, sdcpp-q8_0   stable-diffusion.cpp with weights of 16 or 8 bits

The last five run in environments of their own, built by benchmarks/peers/genai.sh and sdcpp.sh; without these, they are
left out (benchmarks.environments). For OpenVINO's, the model is converted once, by optimum-cli. stable-diffusion.cpp
opens published architectures only, so not the miniature.

Models: the miniature at 64x64, 20 steps; and the architectures of SD 1.5 and SDXL with random weights. A picture
is timed from prompt to pixels in memory, each with a different prompt. A step is timed from one call of the network to
the next, or between two callbacks, the bare engine within it; the difference is the host's share. The roof is the least
time that the step's arithmetic can take at the machine's peak (benchmarks.roof), the highest that any round measured:
in bfloat16 if the contender computes in it, otherwise in float32, also for stable-diffusion.cpp. PSNR compares a
picture of a contender that computes with, or has weights of, fewer than 32 bits with that of the same program in
float32. A cold start is timed from process start to a PNG on disk, with the files in the system's cache, and with
whatever a contender caches on disk (OpenVINO's plans, Inductor's kernels) already there. All contenders get the same
warm-up and threads. A contender's class of precision is 8 bits if its weights are int8, otherwise that of its products.

Results are stored in `--work` and not repeated: an interrupted run resumes with the same command. A contender that
fails has a row with the last line of its error, and is started again only with `--retry`. `--write` writes
docs/results/latency.md, or latency-float32.md on a processor without bfloat16. Not covered: quality, GPUs. Ends in one
line of JSON.
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
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import environments, openvino_cpu
from benchmarks.environments import PEERS, ProcessError, Result, decibels, process
from benchmarks.openvino_cpu import has_bfloat16
from benchmarks.pages import PATH, RESULTS, empty_page, marked, provenance, write_section
from benchmarks.pages import table as markdown_table
from benchmarks.roof import Work, described, floors
from oneword.engines.files import write_whole

CONTENDERS = {  # and the packages they need
    "oneword-onnxruntime": ("onnxruntime",),
    "oneword-openvino": ("openvino",),
    "oneword-onnxruntime-int8": ("onnxruntime",),
    "oneword-openvino-int8": ("openvino",),
    "diffusers": ("torch", "diffusers"),
    "diffusers-compile": ("torch", "diffusers"),
    "diffusers-openvino": ("torch", "diffusers", "openvino"),
}
IN_FLOAT32 = {
    "oneword-openvino": "oneword-onnxruntime",
    "oneword-onnxruntime-int8": "oneword-onnxruntime",
    "oneword-openvino-int8": "oneword-onnxruntime",
    "diffusers-openvino": "diffusers",
}
"""The contender that computes in float32 what this one may not."""
SDCPP = {"sdcpp-f16": "fp16", "sdcpp-q8_0": "int8"}
"""Number formats of weights, to which a product's other operand is rounded too; q8_0 leaves convolutions in fp16."""
COLOURS = ("red", "blue", "green", "yellow", "purple", "orange", "white", "black")
SHAPES = ("star", "ring", "heart", "moon", "square", "cross")
PROMPTS = [f"a photo of a {colour} {shape}" for shape in SHAPES for colour in COLOURS]
GUIDANCE = 5.0
SEED = 7

MEASURES = {
    "picture_ms": "time per picture",
    "step_ms": "time per step",
    "cold_s": "time for a cold start",
    "peak_mib": "peak memory",
}
GENAI_BARS = (
    ("openvino-genai-static", "picture_ms", 0.95),
    ("openvino-genai-static", "cold_s", 0.8),
    ("openvino-genai-dynamic", "peak_mib", 1),
)
"""The most that a measure of oneword-openvino may be, relative to that of each peer, for SD 1.5's architecture."""

NEW_PAGE = empty_page(
    "Latency",
    "Time per picture beside diffusers, torch.compile and OpenVINO.",
    "latency",
    "layers",
    "engine-threads",
)


@dataclass(frozen=True)
class Case:
    """A model and its timing settings."""

    name: str
    title: str
    size: int
    steps: int
    warm_up: int
    pictures: int
    rounds: int
    model: str
    """What cases share a model by, its bundle and its conversions."""


SD15, SDXL = "SD 1.5's architecture, random weights", "SDXL's architecture, random weights"
CASES = {
    "miniature": Case("miniature", "The miniature, 64x64, 20 steps", 64, 20, 6, 10, 3, "miniature"),
    "sd15": Case("sd15", f"{SD15}, 256x256, 4 steps", 256, 4, 1, 2, 3, "sd15"),
    "sd15-512": Case("sd15-512", f"{SD15}, 512x512, 4 steps", 512, 4, 1, 1, 1, "sd15"),
    "sd15-20": Case("sd15-20", f"{SD15}, 256x256, 20 steps", 256, 20, 1, 1, 1, "sd15"),
    "sdxl": Case("sdxl", f"{SDXL}, 512x512, 2 steps", 512, 2, 1, 1, 1, "sdxl"),
}
DEFAULT = ("miniature", "sd15")
Roof = dict[str, Any]
"""What benchmarks.roof prints; empty if OpenVINO is not installed."""


def main() -> None:
    """Runs what is not stored yet; prints tables and one line of JSON."""
    options = _options()
    cases = {name: CASES[name] for name in options.models}
    if options.quick:
        options.work = options.work / "quick"
        if not options.contender:
            shutil.rmtree(options.work, ignore_errors=True)
        cases = {
            name: replace(
                case, steps=2, warm_up=1, pictures=1, rounds=1, title=f"{case.title} (quick, not a measurement)"
            )
            for name, case in cases.items()
        }
    if options.contender:
        [case] = cases.values()
        contend(case, options)
        return
    missing = {name: [p for p in needs if not importlib.util.find_spec(p)] for name, needs in CONTENDERS.items()}
    for name, packages in missing.items():
        if packages:
            print(f"{name} is skipped: {', '.join(packages)} not installed", file=sys.stderr)
    contenders = [name for name, packages in missing.items() if not packages]
    for name, script in environments.available(options.peers).items():
        if script:
            print(f"{name} is skipped: build its environment with sh {script}", file=sys.stderr)
        else:
            contenders.append(name)
    contenders = [name for name in contenders if name in (options.contenders or contenders)]
    results, roofs = {}, {}
    for name, case in cases.items():
        try:
            able = [contender for contender in contenders if not (contender in SDCPP and case.model == "miniature")]
            rounds, roofs[name] = run(case, able, options)
        except ProcessError as error:
            raise SystemExit(f"{error}; finished measurements are stored: the same command resumes") from None
        results[name] = with_roof(medians(rounds), roofs[name])
    for name, case in cases.items():
        print(f"\n{case.title}\n{results_of(name, results[name], roofs[name])}")
    if options.write:
        write(results, roofs, options)
    print(json.dumps({"threads": options.threads, "results": results, "roofs": roofs}))


def run(case: Case, contenders: Sequence[str], options: argparse.Namespace) -> tuple[list[dict[str, Result]], Roof]:
    """Runs every contender in turn, `case.rounds` times; stored results are not repeated. Raises ProcessError if the
    model cannot be made or the roof not measured."""
    home, folder = options.work / case.model, options.work / case.name
    for path in (home, folder):
        path.mkdir(parents=True, exist_ok=True)
    model = prepare(case.model, home)
    bundle = exported(model, home, "float")
    file = stored(options.work, case.name)
    results: dict[str, Result] = json.loads(file.read_text()) if file.exists() else {}
    if options.retry:
        results = {key: result for key, result in results.items() if "error" not in result}
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(home.resolve() / "inductor")  # a private cache, empty at first
    rounds, roofs = [], list[Roof]()
    for number in range(case.rounds):
        key = f"{number} roof {options.threads} threads"
        if key not in results and importlib.util.find_spec("openvino"):
            line = ["-m", "benchmarks.roof", bundle, "--size", case.size, "--threads", options.threads]
            results[key] = json.loads(_python(*line, threads=options.threads))
            write_results(file, results)
        roofs += [results[key]] if key in results else []
        keys = {name: f"{number} {name} {case.steps} steps {options.threads} threads" for name in contenders}
        for name, key in keys.items():
            if key in results:
                continue
            try:
                results[key] = measured(name, case, model, home, folder, options)
                outcome = f"{results[key]['picture_ms']:.0f} ms per picture"
            except ProcessError as error:
                results[key] = {"error": str(error)}
                outcome = f"failed: {error}"
            write_results(file, results)
            print(f"{case.name}, {name}: {outcome}", file=sys.stderr)
        rounds.append({name: results[key] for name, key in keys.items()})
    return rounds, highest(roofs)


def write_results(file: Path, results: Mapping[str, Result]) -> None:
    """Writes all measurements of a case."""
    write_whole(file, json.dumps(results, indent=1).encode(), sync=False)


def measured(name: str, case: Case, model: Path, home: Path, folder: Path, options: argparse.Namespace) -> Result:
    """One contender's results. Raises ProcessError."""
    if name in PEERS:
        return environments.measured(name, job_of(case, options.threads), model, home, folder, options)
    bundle = exported(model, home, "int8") if name.endswith("-int8") else home / "bundle"
    shared = ["--contender", name, "--models", case.name, "--threads", options.threads]
    shared += ["--model", model, "--bundle", bundle, *(["--quick"] if options.quick else [])]
    _cold(name, case, bundle, folder, shared, options.threads)  # fills its caches
    result: Result = json.loads(_python("-m", "benchmarks.latency", *shared, threads=options.threads))
    result["cold_s"] = _cold(name, case, bundle, folder, shared, options.threads)
    return result | distance(name, folder)


def highest(roofs: Sequence[Roof]) -> Roof:
    """The roof at the highest peaks of all rounds, since other processes only lower a peak."""
    if not roofs:
        return {}
    peaks = {name: max(roof["peaks"][name] for roof in roofs) for name in roofs[0]["peaks"]}
    work = Work(roofs[0]["flops"], roofs[0]["numbers"])
    return {"flops": work.flops, "numbers": work.numbers, "peaks": peaks, "floors": floors(work, peaks)}


def job_of(case: Case, threads: int) -> dict[str, Any]:
    """What a contender in an environment of its own is given; see benchmarks/peers/pictures.py."""
    return {
        "precision": "bf16" if has_bfloat16() else "f32",
        "size": case.size,
        "steps": case.steps,
        "guidance": GUIDANCE,
        "seed": SEED,
        "threads": threads,
        "warm_up": PROMPTS[: case.warm_up],
        "prompts": PROMPTS[case.warm_up : case.warm_up + case.pictures],
    }


def distance(name: str, folder: Path) -> Result:
    """PSNR of the picture of a contender's cold start to that of the one in float32, if both exist."""
    reference = IN_FLOAT32.get(name)
    if reference is None or not (picture_of(name, folder) and picture_of(reference, folder)):
        return {}
    return {"db": decibels(*(max(picture_of(n, folder), key=os.path.getmtime) for n in (name, reference)))}


def picture_of(name: str, folder: Path) -> list[Path]:
    """The files that a contender's cold starts have written."""
    return [*folder.glob(f"{name}.png"), *(folder / name).glob("*.png")]


def with_roof(results: Mapping[str, Result], roof: Roof) -> dict[str, Result]:
    """The results, with the share of the roof that each contender's step reaches."""
    if not roof:
        return {**results}
    least, low = roof["floors"], "bf16" in roof["floors"]
    return {
        name: result
        if "error" in result
        else {**result, "roof": 1e3 * least["bf16" if low and in_openvino(name) else "f32"] / result["step_ms"]}
        for name, result in results.items()
    }


def stored(work: Path, case: str) -> Path:
    """The file of a model's results."""
    return work / case / "results.json"


def prepare(name: str, home: Path) -> Path:
    """A model as a diffusers directory."""
    if name == "miniature":
        return Path(str(importlib.resources.files("oneword") / "miniature"))
    model = home / name
    if not (model / "model_index.json").is_file():
        _python("-m", "benchmarks.random_models", name, model, threads=0)
    return model


def exported(model: Path, home: Path, weights: str) -> Path:
    """The model's bundle with such weights, `float` or `int8`. In its own process, because exports need much memory."""
    bundle = home / ("bundle" if weights == "float" else f"bundle-{weights}")
    script = "import sys; from pathlib import Path; from benchmarks.exported import exported; "
    script += "from oneword.engines.graph import Weights; "
    script += "exported(sys.argv[1], Path(sys.argv[2]), Weights(sys.argv[3]))"
    _python("-c", script, model, bundle, weights, threads=0)
    return bundle


def contend(case: Case, options: argparse.Namespace) -> None:
    """Runs in a contender's own process: writes one picture, or prints the measurements as JSON."""
    if options.cold:
        pipeline = _pipeline(options.model, options.contender, case)
        _draw(pipeline, case, PROMPTS[0]).save(options.cold)
        return
    contender = _ours if options.contender.startswith("oneword") else _diffusers
    draw, step_seconds = contender(case, options)
    for prompt in PROMPTS[: case.warm_up]:
        draw(prompt)
    pictures, steps = [], []
    for prompt in PROMPTS[case.warm_up : case.warm_up + case.pictures]:
        start = time.perf_counter()
        draw(prompt)
        pictures.append(time.perf_counter() - start)
        steps.append(step_seconds())
    step, bare = (statistics.median(seconds) for seconds in zip(*steps, strict=True))
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
    """A step is timed from one call of the denoiser's binding to the next, the bare engine within the call. So the
    first step is without encoding, and the last, which decoding follows, is left out."""
    from oneword.runtime.drawing import scheduler_for
    from oneword.runtime.model import Model
    from oneword.runtime.request import Request

    model = Model.open(options.bundle, backend_of(options.contender), threads=options.threads)
    engine: Any = model.engine("denoise_step")
    bind, spent, starts = engine.bind, list[float](), list[float]()

    def timed_bind(*args: Any) -> Any:
        binding = bind(*args)
        run = binding.run

        def timed(stream: int | None = None) -> None:
            start = time.perf_counter()
            run(stream)
            starts.append(start)
            spent.append(time.perf_counter() - start)

        binding.run = timed
        return binding

    engine.bind = timed_bind

    def draw(prompt: str) -> None:
        spent.clear()
        starts.clear()
        size = (case.size, case.size)
        request = Request(prompt, seed=SEED, steps=case.steps, guidance_scale=GUIDANCE, size=size)
        scheduler = scheduler_for(model, [request])
        while scheduler:
            scheduler.step()

    def step_seconds() -> tuple[float, float]:
        return (starts[-1] - starts[0]) / (len(starts) - 1), statistics.mean(spent[:-1])

    return draw, step_seconds


def _diffusers(case: Case, options: argparse.Namespace) -> tuple[Draw, StepSeconds]:
    """A step is timed between two callbacks; the bare engine is the UNet's time within it."""
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
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    pipeline = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
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
    names = ("text_embeds", "time_ids") if unet.config.addition_embed_type else ()
    if names:
        pooled = pipeline.text_encoder_2.config.projection_dim
        example |= {"text_embeds": torch.zeros(2, pooled), "time_ids": torch.zeros(2, 6)}

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any, *added: Any) -> Any:
            conditions = dict(zip(names, added, strict=True)) or None
            inputs = (sample, timestep, encoder_hidden_states)
            return self.unet(*inputs, added_cond_kwargs=conditions, return_dict=False)[0]

    core = openvino.Core()
    settings = openvino_cpu.settings(openvino_cpu.precision_of(core), torch.get_num_threads())
    graph = openvino.convert_model(Network(), example_input=tuple(example.values()))
    graph.reshape({i: list(value.shape) for i, value in enumerate(example.values())})
    compiled = core.compile_model(graph, "CPU", settings)

    def forward(sample: Any, timestep: Any, encoder_hidden_states: Any, added_cond_kwargs: Any = None, **_: Any) -> Any:
        added = [added_cond_kwargs[name] for name in names]
        feeds = [value.numpy() for value in (sample, timestep, encoder_hidden_states, *added)]
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


def _cold(name: str, case: Case, bundle: Path, folder: Path, shared: Sequence[object], threads: int) -> float:
    """Seconds from process start to a PNG, by `ti-run` or a diffusers script."""
    start = time.perf_counter()
    if name.startswith("oneword"):
        line: list[object] = ["--steps", case.steps, "--seed", SEED, "--guidance-scale", GUIDANCE]
        line += ["--size", f"{case.size}x{case.size}", "--engine", backend_of(name)]
        _python("-m", "oneword.runtime.cli", bundle, PROMPTS[0], *line, "--output", folder / name, threads=threads)
    else:
        _python("-m", "benchmarks.latency", *shared, "--cold", folder / f"{name}.png", threads=threads)
    return time.perf_counter() - start


def backend_of(name: str) -> str:
    """What ti-run calls the backend of one of our contenders."""
    return name.removeprefix("oneword-").removesuffix("-int8")


def _python(*line: object, threads: int) -> str:
    """The last line that a process of this Python prints; 0 threads means its own default."""
    return process([sys.executable, "-W", "ignore", *line], threads=threads)


def medians(rounds: Sequence[Mapping[str, Result]]) -> dict[str, Result]:
    """Of the rounds in which a contender did not fail; its first error if it failed in all."""
    results: dict[str, Result] = {}
    for name in rounds[0]:
        runs = [by_contender[name] for by_contender in rounds if "error" not in by_contender[name]]
        keys = [key for key in (runs or [{}])[0] if all(key in run for run in runs)]
        results[name] = {key: round(statistics.median(run[key] for run in runs), 3) for key in keys} or rounds[0][name]
    return results


def successes(results: Mapping[str, Result]) -> dict[str, Result]:
    """The results of the contenders that did not fail."""
    return {name: result for name, result in results.items() if "error" not in result}


def results_of(case: str, results: Mapping[str, Result], roof: Roof) -> str:
    """One model's table, targets and roof in Markdown."""
    lines = [*bars(case, results), *class_lines(results, has_bfloat16())]
    if roof:
        lines.append(f"- {described(Work(roof['flops'], roof['numbers']), roof['peaks'])}")
    return f"{table(results, case, has_bfloat16())}\n\n" + "\n".join(lines)


def table(results: Mapping[str, Result], case: str, bfloat16: bool) -> str:
    """One model's results in Markdown; both `faster` are relative to diffusers, eager."""
    base = successes(results).get("diffusers")
    head = ["", "computes in", "weights", "ms per picture", "picture faster", "ms per step", "of the roof"]
    head += ["of which the host", "cold start, s", "start faster", "peak MiB", "PSNR, dB"]
    rows = []
    for name, result in results.items():
        numbers = numbers_of(name, case, bfloat16)
        if "error" in result:
            error = PATH.sub("PATH", result["error"]).replace("|", "/")
            rows.append([name, *numbers, f"failed: {error}", *[""] * (len(head) - 4)])
            continue
        faster = f"{base['picture_ms'] / result['picture_ms']:.2f}x" if base else ""
        colder = f"{base['cold_s'] / result['cold_s']:.2f}x" if base else ""
        host = f"{result['overhead_ms']:.2f} ({result['overhead_ms'] / result['step_ms']:.1%})"
        picture, step = f"{result['picture_ms']:.1f}", f"{result['step_ms']:.2f}"
        roof = f"{result['roof']:.0%}" if "roof" in result else ""
        db = f"{result['db']:.1f}" if "db" in result else ""
        cold, peak = f"{result['cold_s']:.2f}", f"{result['peak_mib']:.0f}"
        rows.append([name, *numbers, picture, faster, step, roof, host, cold, colder, peak, db])
    return markdown_table(head, rows)


def bars(case: str, results: Mapping[str, Result]) -> list[str]:
    """The targets and whether each is met, and every measure in which another contender is better than ours."""
    lines, results = list[str](), successes(results)

    def bar(name: str, value: float, limit: float, *, least: bool) -> None:
        met = value >= limit if least else value <= limit
        measured = marked(digits(value, limit), met)
        lines.append(f"- {name}: {measured} ({'at least' if least else 'at most'} {limit:g})")

    base = results.get("diffusers")
    for name, times in (("oneword-onnxruntime", 1.8), ("oneword-openvino", 2.5)):
        if (ours := results.get(name)) is None:
            continue
        if base and case == "miniature":
            quotient = base["picture_ms"] / ours["picture_ms"]
            bar(f"{name}, times faster than diffusers per picture", quotient, times, least=True)
        if base:
            bar(f"{name}, cold start relative to diffusers", ours["cold_s"] / base["cold_s"], 0.25, least=False)
        bar(f"{name}, the host's share of a step", ours["overhead_ms"] / ours["step_ms"], 0.03, least=False)
        if name == "oneword-openvino" and (bare := results.get("diffusers-openvino")):
            quotient = ours["step_ms"] / (bare["step_ms"] - bare["overhead_ms"])
            bar(f"{name}, a step relative to the bare UNet compiled for one shape", quotient, 1.03, least=False)
        if case == "sd15" and name == "oneword-openvino":
            for peer, key, limit in GENAI_BARS:
                if result := results.get(peer):
                    quotient = ours[key] / result[key]
                    bar(f"{name}, {MEASURES[key]} relative to {peer}", quotient, limit, least=False)
        if case == "sd15" and name == "oneword-onnxruntime" and base:
            quotient = base["step_ms"] / ours["step_ms"]
            bar(f"{name}, times faster than diffusers per step", quotient, 1.25, least=True)
            quotient = ours["peak_mib"] / base["peak_mib"]
            bar(f"{name}, peak memory relative to diffusers", quotient, 1, least=False)
        for peer, result in results.items():
            for key, measure in MEASURES.items():
                if not peer.startswith("oneword") and result[key] < ours[key]:
                    lines.append(f"- {name}: {digits(ours[key] / result[key], 1)} times the {measure} of {peer}")
    return lines


def class_lines(results: Mapping[str, Result], bfloat16: bool) -> list[str]:
    """For every class of precision and every measure, the best of ours relative to the best of theirs."""
    lines, results = [], successes(results)
    for bits in (32, 16, 8):
        members = {name: result for name, result in results.items() if bits_of(name, bfloat16) == bits}
        ours, theirs = (
            {name: result for name, result in members.items() if name.startswith("oneword") == mine}
            for mine in (True, False)
        )
        if not ours or not theirs:
            continue
        for key, measure in MEASURES.items():
            mine, peer = (min(group, key=lambda name: group[name][key]) for group in (ours, theirs))
            ratio = ours[mine][key] / theirs[peer][key]
            lines.append(f"- {bits} bits, {measure}: {mine} {marked(digits(ratio, 1), ratio <= 1)} of {peer}")
    return lines


def bits_of(name: str, bfloat16: bool) -> int:
    """A contender's class of precision: 8 bits if its weights are int8, otherwise that of its products."""
    computes, weights = numbers_of(name, "sd15", bfloat16)
    return 8 if weights == "int8" else 32 if computes == "fp32" else 16


def numbers_of(name: str, case: str, bfloat16: bool) -> tuple[str, str]:
    """The number formats that a contender computes its products in and reads its weights in."""
    if name in SDCPP:
        return SDCPP[name], SDCPP[name]
    computes = "bf16" if bfloat16 and in_openvino(name) else "fp32"
    if name.endswith("-int8"):
        return computes, "int8"
    halved = name == "oneword-openvino" and case != "miniature"  # a small graph's are not
    return computes, "fp16" if halved or name == "optimum-intel" or name.startswith("openvino-genai") else "fp32"


def in_openvino(name: str) -> bool:
    """Whether a contender's network runs in OpenVINO."""
    return "openvino" in name or name == "optimum-intel"


def digits(value: float, limit: float) -> str:
    """A value with three digits, or as many more as it takes to differ from a limit that it does not equal."""
    for count in range(3, 10):
        text = f"{value:.{count}g}"
        if value == limit or float(text) != limit:
            break
    return text


def plot(results: Mapping[str, Mapping[str, Result]], path: Path) -> None:
    """Plots the time of a picture and of a cold start per contender, one row of panels per model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = {case: successes(by_contender) for case, by_contender in results.items()}
    figure, rows = pyplot.subplots(len(results), 2, figsize=(10, 3 * len(results)), layout="constrained", squeeze=False)
    for axes_row, (case, by_contender) in zip(rows, results.items(), strict=True):
        names = list(by_contender)[::-1]
        colours = ["#c0392b" if name.startswith("oneword") else "#7f8c8d" for name in names]
        for axes, key, title in zip(
            axes_row, ("picture_ms", "cold_s"), ("a picture, ms", "cold start, s"), strict=True
        ):
            bars_drawn = axes.barh(names, [by_contender[name][key] for name in names], color=colours)
            axes.bar_label(
                bars_drawn, fmt=lambda value: f"{value:,.0f}" if value >= 1000 else f"{value:.3g}", padding=3
            )
            axes.set_title(f"{plot_title(case)}:\n{title}", fontsize="medium")
            axes.spines[["top", "right"]].set_visible(False)
            axes.margins(x=0.15)
            axes.locator_params(axis="x", nbins=4)
            axes.xaxis.set_major_formatter("{x:,.0f}" if key == "picture_ms" else "{x:g}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def plot_title(case: str) -> str:
    """The model, size and steps of a case."""
    return CASES[case].title.replace(", random weights", "")


def write(results: Mapping[str, Mapping[str, Result]], roofs: Mapping[str, Roof], options: argparse.Namespace) -> None:
    """Writes docs/results/latency.md, or latency-float32.md on a processor without bfloat16, and its plot."""
    page = page_of()
    plot(results, page.with_suffix(".png"))
    write_section(page, "latency", section(results, roofs, options, page.with_suffix(".png").name), NEW_PAGE)


def page_of() -> Path:
    """The page of this processor."""
    return RESULTS / ("latency.md" if has_bfloat16() else "latency-float32.md")


def section(
    results: Mapping[str, Mapping[str, Result]],
    roofs: Mapping[str, Roof],
    options: argparse.Namespace,
    plot_name: str,
) -> str:
    """The generated part of the page."""
    from importlib.metadata import version

    packages = ("torch", "diffusers", "onnxruntime", "openvino")
    installed = [f"{name} {version(name)}" for name in packages if importlib.util.find_spec(name)]
    versions = ", ".join([f"Python {platform.python_version()}", *installed])
    parts = [
        provenance("latency", stored=stored(options.work, next(iter(results)))),
        f"{options.threads} threads, {versions}. Bold: misses its target.",
        f"![time of a picture and of a cold start for each contender]({plot_name})",
    ]
    for name, by_contender in results.items():
        parts.append(f"## {CASES[name].title}\n\n{results_of(name, by_contender, roofs[name])}")
    return "\n\n".join(parts)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(DEFAULT))
    parser.add_argument(
        "--contenders", nargs="+", choices=[*CONTENDERS, *PEERS], help="default: all that are installed"
    )
    parser.add_argument("--peers", type=Path, default=Path("build/peers"), help="folder of the other environments")
    parser.add_argument("--quick", action="store_true", help="two steps per contender, to check that all run")
    parser.add_argument("--retry", action="store_true", help="start contenders again that failed in an earlier run")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--work", type=Path, default=Path("build/latency"), help="folder for models, bundles and results"
    )
    parser.add_argument("--write", action="store_true", help="write the page and its plot in docs/results/")
    for name in ("--contender", "--model", "--bundle", "--cold"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write and (options.quick or options.contenders or not set(options.models) >= set(DEFAULT)):
        parser.error(f"--write needs all contenders and at least --models {' '.join(DEFAULT)}, without --quick")
    return options


if __name__ == "__main__":
    main()
