"""The stages of `benchmarks.gpu` that need no model of full size. Each returns what it measured, or raises.

A stage that finds a wrong number raises SystemExit with one line that says which, so that it counts as failed.
"""

import importlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.psnr import psnr
from benchmarks.store import all_rows, file_of
from benchmarks.trace import gpu_use, read_trace
from oneword.engines.open import Backend, gpu_stream
from oneword.runtime.concept import Concept
from oneword.runtime.drawing import draw
from oneword.runtime.events import Failed, PictureDone
from oneword.runtime.model import Model
from oneword.runtime.request import Request
from oneword.runtime.samplers import Sampler
from oneword.runtime.scheduler import Scheduler

LEAST_DB = 40.0
"""The least PSNR of a picture to the host's in fp32."""
Result = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What every stage is given."""

    work: Path
    bundle: Path
    """Of a small model."""
    script: Path | None
    """diffusers' textual_inversion.py."""
    seconds: float
    """After which the stage is stopped."""
    simulated: bool
    """Whether CUDA is simulated; then sizes and counts are small."""


def arrays(settings: Settings) -> Result:
    """Arrays, rows, regions, pinned memory and a replay on the device, each against numpy; then copies, in GB/s."""
    stream, random = gpu_stream(), np.random.default_rng(0)
    checks = 0

    def check(subject: str, actual: Any, expected: Any) -> None:
        nonlocal checks
        checks += 1
        if not np.array_equal(actual, expected):
            raise SystemExit(f"{subject} differs from the host")

    for dtype in (np.float32, np.float16, np.int64, np.bool_):
        host = random.integers(0, 2, (4, 3, 8, 6)).astype(dtype)
        array = stream.put(host)
        check(f"a copy of {np.dtype(dtype)}", array.numpy(), host)
        for region in (..., 2, (1, 2), (0, slice(1, 3)), (slice(None), 1), (3, 2, 7, 5)):
            host[region] = 1 - host[region].astype(np.int64)
            array.write(region, host[region])
            check(f"region {region} of {np.dtype(dtype)}", array.read(region), host[region])
            check(f"the array around region {region} of {np.dtype(dtype)}", array.numpy(), host)
        row = stream.empty(host.shape[1:], dtype)
        check("an empty array", row.numpy(), np.zeros(host.shape[1:], dtype))
        stream.load_row(row, array, 2)
        check("a row", row.numpy(), host[2])
    source, target = stream.pinned((8,), np.float32), stream.pinned((8,), np.float32)
    array, copied = stream.empty((8,), np.float32), stream.empty((8,), np.float32)

    def there_and_back() -> None:
        stream.upload(array, source)
        stream.copy(copied, array)
        stream.download(target, copied)

    source[:] = 1
    there_and_back()
    stream.record().wait()
    check("pinned memory", target, source)
    replay = stream.capture(there_and_back)
    for value in (2, 3):
        source[:] = value
        replay()
        stream.record().wait()
        check("a replay", target, source)
    return {"device": stream.device.name, "checks": checks, **_bandwidths(1 if settings.simulated else 256)}


def _bandwidths(mebibytes: int) -> Result:
    """GB/s of copies of pinned memory to and from the device, and within it."""
    stream = gpu_stream()
    shape = (mebibytes << 18,)
    host, first, second = stream.pinned(shape, np.float32), *(stream.empty(shape, np.float32) for _ in range(2))
    copies: dict[str, Callable[[], None]] = {
        "to the device": lambda: stream.upload(first, host),
        "to the host": lambda: stream.download(host, first),
        "on the device": lambda: stream.copy(second, first),
    }
    speeds = {}
    for name, copy in copies.items():
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            copy()
            stream.wait()
            seconds.append(time.perf_counter() - start)
        speeds[f"GB/s {name}"] = round(4e-9 * shape[0] / min(seconds), 1)
    return speeds


def cuda(settings: Settings) -> Result:
    """The pictures of ONNX Runtime's CUDA provider beside those of its CPU provider."""
    return parity(Backend.CUDA, settings)


def tensorrt(settings: Settings) -> Result:
    """TensorRT: plans of every graph, then their pictures beside those of ONNX Runtime on the CPU."""
    return planned(Backend.TENSORRT, settings)


def tensorrt_rtx(settings: Settings) -> Result:
    """The same in TensorRT-RTX."""
    return planned(Backend.TENSORRT_RTX, settings)


def planned(backend: Backend, settings: Settings) -> Result:
    """Seconds and MiB of a backend's plans, and how far its pictures are from the host's."""
    from oneword.engines.builder import Flavour
    from oneword.runtime.bundle import Bundle
    from oneword.runtime.profiles import build_plans

    start = time.perf_counter()
    plans = build_plans(Bundle.open(settings.bundle), Flavour(backend), gpu_stream().device.target)
    built = round(time.perf_counter() - start, 1)
    size = sum(path.stat().st_size for paths in plans.values() for path in paths)
    engine: Any = opened(settings, backend).engine("denoise_step")
    report = engine._engine(*engine._plans[0]).create_engine_inspector().get_engine_information(_json_format(backend))
    (settings.work / f"layers-{backend}.json").write_text(report)
    return {"plans, s": built, "plans, MiB": round(size / 2**20, 1), **layers_of(report), **parity(backend, settings)}


def _json_format(backend: Backend) -> Any:
    library: Any = importlib.import_module(backend.value.replace("-", "_"))
    return library.LayerInformationFormat.JSON


def layers_of(report: str) -> Result:
    """How many layers an engine inspector lists for the denoise step, and how many of them are fused attention."""
    layers = [layer if isinstance(layer, str) else layer["Name"] for layer in json.loads(report)["Layers"]]
    attentions = sum("mha" in name.lower() or "attention" in name.lower() for name in layers)
    return {"layers of a step": len(layers), "fused attentions": attentions}


def parity(backend: Backend, settings: Settings) -> Result:
    """PSNR of a backend's pictures to the host's: mixed requests that share its slots, with a word. Raises SystemExit
    below LEAST_DB."""
    host, device = (opened(settings, name) for name in (Backend.ONNXRUNTIME, backend))
    requests = mixed()
    expected, actual = (draw(model, *requests) for model in (host, device))
    decibels = [psnr(a.image, b.image) for a, b in zip(actual, expected, strict=True)]
    if min(decibels) < LEAST_DB:
        raise SystemExit(f"a picture is {min(decibels):.1f} dB from the host's, at least {LEAST_DB:g} are required")
    return {
        "backend": device.engine("denoise_step").backend,
        "pictures": len(decibels),
        "identical": sum(value == float("inf") for value in decibels),
        "least dB": round(min(min(decibels), 99.0), 1),
    }


def replays(settings: Settings) -> Result:
    """The share of a scheduler's steps that are replayed, and the GPU's gaps while it draws, by backend."""
    results, errors = {}, {}
    for backend in (Backend.TENSORRT, Backend.CUDA):
        try:
            results[str(backend)] = _replayed(backend, settings)
        except Exception as error:  # the other backend may run
            errors[str(backend)] = {"error": str(error).partition("\n")[0][:300]}
    if not results:
        raise SystemExit("; ".join(f"{name}: {result['error']}" for name, result in errors.items()))
    return {**results, **errors}


def _replayed(backend: Backend, settings: Settings) -> Result:
    model = opened(settings, backend)
    scheduler = Scheduler(model, 4)
    scheduler.warm()
    steps, seconds = 4 if settings.simulated else 30, 0.0

    def run() -> None:
        nonlocal seconds
        for request in mixed(steps):
            scheduler.add(request)
        start = time.perf_counter()
        pictures_of(scheduler)
        seconds = time.perf_counter() - start

    run()
    use = profiled(run, settings.work / f"trace-{backend}.json")
    stats = scheduler.denoiser.stats
    return {
        "steps": stats.steps,
        "share replayed": round(stats.replayed / stats.steps, 3),
        "share padding": round(stats.padding / stats.branches, 3),
        "bindings": stats.bindings,
        "drawing, s": round(seconds, 3),
        **use,
    }


def profiled(work: Callable[[], None], path: Path) -> Result:
    """What the GPU does meanwhile, by PyTorch's profiler, which sees the kernels of every library."""
    try:
        import torch
    except ImportError:
        work()
        return {"trace": "none: PyTorch is not installed"}
    if not torch.cuda.is_available():
        work()
        return {"trace": "none: PyTorch finds no GPU"}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))
    return gpu_use(read_trace(path)) or {"trace": "the profiler saw no work on the GPU"}


def swaps(settings: Settings) -> Result:
    """Turns of a busy scheduler with and without a word loaded before each; then a picture of the last word beside the
    host's."""
    device = opened(settings, Backend.CUDA)
    scheduler = Scheduler(device, 4)
    scheduler.warm()
    turns = 40 if settings.simulated else 600
    words, loads = vectors(device), list[float]()

    def load() -> None:
        start = time.perf_counter()
        device.unload("<w>")
        device.load(Concept("<w>", next(words)))
        loads.append(1e3 * (time.perf_counter() - start))

    _turns(scheduler, turns // 4)  # to warm up
    quiet = _turns(scheduler, turns)
    swapped = _turns(scheduler, turns, load)
    scheduler.cancel_all()
    pictures_of(scheduler)
    host, last = opened(settings, Backend.ONNXRUNTIME), Concept("<w>", next(words))
    for model in (host, device):
        model.unload(last.token)
        model.load(last)
    request = Request("a photo of a <w>", seed=3, steps=4)
    [expected], [actual] = (draw(model, request) for model in (host, device))
    decibels = psnr(expected.image, actual.image)
    if decibels < LEAST_DB:
        raise SystemExit(f"the picture of the last word is {decibels:.1f} dB from the host's, not {LEAST_DB:g}")
    return {
        "words loaded": len(loads),
        "loading, ms": round(statistics.median(loads), 3),
        "slowest load, ms": round(max(loads), 3),
        "turn, ms": round(statistics.median(quiet), 3),
        "turn with a load, ms": round(statistics.median(swapped), 3),
        "p99, ms": round(_p99(quiet), 3),
        "p99 with loads, ms": round(_p99(swapped), 3),
        "last word, dB": round(min(decibels, 99.0), 1),
    }


def _turns(scheduler: Scheduler, count: int, before: Callable[[], None] = lambda: None) -> list[float]:
    """Milliseconds of each turn, with what happens before it, while the slots are full of pictures of the word."""
    milliseconds = []
    for number in range(count):
        while len(scheduler) < 2 * scheduler.max_rows:
            scheduler.add(Request("a photo of a <w>", seed=number, steps=20))
        start = time.perf_counter()
        before()
        failed = [event.error for event in scheduler.step() if isinstance(event, Failed)]
        milliseconds.append(1e3 * (time.perf_counter() - start))
        if failed:
            raise failed[0]
    return milliseconds


def _p99(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


def learning(settings: Settings) -> Result:
    """Seconds to learn a word: `ti-train`, which computes on the CPU, and diffusers' script on the GPU."""
    if settings.script is None:
        raise SystemExit("left out: give the path of diffusers' textual_inversion.py with --script")
    work = settings.work / "training"
    command = [sys.executable, "-m", "benchmarks.training", settings.script, "--words", 1, "--work", work]
    command += ["--script-steps", 500, "--budgets", 50, "--samples", 4, "--threads", len(os.sched_getaffinity(0))]
    subprocess.run([*map(str, command)], stdout=subprocess.DEVNULL, check=True)
    rows = [row for row in all_rows(file_of(work)) if row.get("contender") in ("oneword", "diffusers")]
    longest = {row["contender"]: row for row in sorted(rows, key=lambda row: row["steps"])}
    return {
        f"{name}, {row['steps']} steps": {
            "s": round(row["seconds"], 1),
            "likeness": row["likeness"],
            "editability": row["editability"],
        }
        for name, row in longest.items()
    }


# ---- what the stages share -------------------------------------------------------------------------------------------


def opened(settings: Settings, backend: Backend) -> Model:
    """The small model with a word `<w>`."""
    model = Model.open(settings.bundle, backend, threads=1 if settings.simulated else None)
    model.load(Concept("<w>", next(vectors(model))))
    return model


def vectors(model: Model) -> Iterator[Mapping[str, Any]]:
    """Different words of two vectors each, as long as the table's rows."""
    for seed in itertools.count():
        random = np.random.default_rng(seed)
        yield {
            encoder.graph: (random.standard_normal((2, encoder.width)) * 0.4 / encoder.width**0.5).astype(np.float32)
            for encoder in model.manifest.encoders
        }


def mixed(steps: int = 4) -> list[Request]:
    """Requests of several samplers, lengths and guidance, two of which draw the word."""
    return [
        Request("a photo of a <w>", seed=1, steps=steps + 2, sampler=Sampler.EULER_A),
        Request("a cat", seed=2, steps=steps, guidance_scale=1.0, num_images=2),
        Request("a <w> and a dog", seed=4, steps=steps + 4, sampler=Sampler.DPMPP_2M),
        Request("a star", seed=5, steps=steps + 1, guidance_interval=(0.5, 5.0)),
    ]


def pictures_of(scheduler: Scheduler) -> list[PictureDone]:
    """Runs everything that is queued. Raises the error of the first picture that fails."""
    pictures = []
    while scheduler:
        for event in scheduler.step(None):
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, PictureDone):
                pictures.append(event)
    return pictures
