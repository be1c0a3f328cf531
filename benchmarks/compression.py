"""Memory, disk, time and pictures of bundles whose weights are stored differently.

    python -m benchmarks.compression FP32 FP16 INT8 [--engine onnxruntime openvino] [--size 512] [--steps 2] [--write]

The arguments are bundles of one model; the first is the reference for pictures. Each engine starts twice with each
bundle, in a process of its own that draws one picture: the first start may write OpenVINO's files, the second reads
them. Disk is the bundle's without these files. Peak memory is the process's, mapped files included; seconds are from
opening the bundle to the picture. Pictures after few steps of a model with random weights are noise: use trained
weights and 20 or more steps for PSNR. If a bundle in fp16 and one with int8 weights are among them, their peaks of the
second start are compared. `--write` writes docs/results/compression.md. Ends in one line of JSON. Not covered: quality
by a judge (`benchmarks.miniature --weights int8`), and GPUs.
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.pages import RESULTS, empty_page, marked, model_name, provenance, table, write_section
from benchmarks.psnr import psnr
from oneword.engines.graph import Weights
from oneword.engines.open import Backend
from oneword.runtime.bundle import Bundle
from oneword.runtime.drawing import draw
from oneword.runtime.model import Model

PAGE = RESULTS / "compression.md"
NEW_PAGE = empty_page("Compression", "Bundles of one model whose weights are stored differently.", "compression")
BAR = 0.6
"""The most that int8 weights may need of the memory of 16 bits."""
FP16, INT8 = "fp16", "fp32, int8 weights"
CPU = (Backend.ONNXRUNTIME.value, Backend.OPENVINO.value)


def main() -> None:
    """Draws with every bundle and engine; prints a table and one line of JSON."""
    options = _options()
    if options.picture:
        print(json.dumps(draw_and_save(options)))
        return
    check_forms(options.bundles)
    options.work.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, float]] = {}
    peaks: dict[str, dict[str, float]] = {}
    names: list[str] = []
    for engine in options.engine:
        reference = None
        for bundle in options.bundles:
            file = options.work / "picture.npy"
            first, second = (_start(bundle, engine, file, options) for _ in range(2))
            picture = np.load(file)
            reference = picture if reference is None else reference
            results[f"{engine}: {bundle} ({form(bundle)})"] = {
                "disk_mib": sum((bundle / name).stat().st_size for name in Bundle.open(bundle).manifest.files) / 2**20,
                "first_peak_mib": first["peak_mib"],
                "peak_mib": second["peak_mib"],
                "seconds": second["seconds"],
                "psnr_db": psnr(picture, reference),
            }
            peaks.setdefault(engine, {})[form(bundle)] = second["peak_mib"]
            names.append(f"{engine}: {bundle.resolve().name} ({form(bundle)})")
    head = ["", "on disk, MiB", "peak of the first start, MiB", "of the second", "seconds", "PSNR to the first, dB"]
    rows = [[name, *(f"{value:.4g}" for value in result.values())] for name, result in results.items()]
    lines = "\n".join(bars(peaks))
    print(f"{table(head, rows)}\n\n{lines}")
    if options.write:
        for row, name in zip(rows, names, strict=True):
            row[0] = name  # without folders of this machine
        model = model_name(Bundle.open(options.bundles[0]).manifest.source.id)
        about = f"A picture of {model} at {options.size}x{options.size}, {options.steps} steps."
        text = f"{provenance('compression')}\n\n{about}\n\n{table(head, rows)}\n\n{lines}"
        write_section(PAGE, "compression", text, NEW_PAGE)
    print(json.dumps(results))


def bars(peaks: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The peak of int8 weights relative to that of 16 bits, for each engine that ran both."""
    shares = {
        engine: by_form[INT8] / by_form[FP16]
        for engine, by_form in peaks.items()
        if INT8 in by_form and FP16 in by_form
    }
    return [
        f"- {engine}, peak memory with int8 weights relative to fp16: {marked(f'{share:.3f}', share <= BAR)} "
        f"(at most {BAR:g})"
        for engine, share in shares.items()
    ]


def check_forms(bundles: Sequence[Path]) -> None:
    """Raises SystemExit if a bundle is given twice, or two store their weights in the same form."""
    for first, second in itertools.combinations(bundles, 2):
        if first.resolve() == second.resolve():
            raise SystemExit(f"{second} is given twice: give each bundle once")
        if form(first) == form(second):
            raise SystemExit(f"{first} and {second} are both in {form(first)}: give one bundle of each form")


def form(bundle: Path) -> str:
    """A bundle's precision, and how it stores its weights: `fp32`, or `fp32, int8 weights`."""
    graph = Bundle.open(bundle).graph("denoise_step")
    return f"{graph.precision}" if graph.weights is Weights.FLOAT else f"{graph.precision}, {graph.weights} weights"


def draw_and_save(options: argparse.Namespace) -> dict[str, float]:
    """Draws one picture and writes it to `options.picture`. Runs in a child process."""
    start = time.perf_counter()
    model = Model.open(options.bundles[0], options.engine[0], threads=options.threads)
    size = (options.size, options.size)
    [picture] = draw(model, options.prompt, seed=1, steps=options.steps, size=size)
    seconds = time.perf_counter() - start
    np.save(options.picture, picture.image)
    return {"seconds": seconds, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def _start(bundle: Path, engine: str, picture: Path, options: argparse.Namespace) -> dict[str, float]:
    line = [sys.executable, "-m", "benchmarks.compression", bundle, "--engine", engine, "--picture", picture]
    line += ["--size", options.size, "--steps", options.steps, "--prompt", options.prompt]
    line += [] if options.threads is None else ["--threads", options.threads]
    run = subprocess.run([*map(str, line)], stdout=subprocess.PIPE, check=True)
    result: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return result


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--engine", nargs="+", choices=CPU, default=CPU)
    parser.add_argument("--size", type=int, default=512, help="width and height of the picture")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--prompt", default="a photo of a red star")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--work", type=Path, default=Path("build/compression"))
    parser.add_argument("--write", action="store_true", help="write docs/results/compression.md")
    parser.add_argument("--picture", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
