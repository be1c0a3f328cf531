"""Memory, disk, time and pictures of bundles whose weights are stored differently.

    python -m benchmarks.compression FP32 FP16 INT8 [--engine onnxruntime openvino] [--size 512] [--steps 2]

The arguments are bundles of one model; the first is the reference for pictures. Each engine starts twice with each
bundle, in a process of its own that draws one picture: the first start may write OpenVINO's files, the second reads
them. Disk is the bundle's without these files. Peak memory is the process's, mapped files included; seconds are from
opening the bundle to the picture. Pictures after few steps of a model with random weights are noise: use trained
weights and 20 or more steps for PSNR. Ends in one line of JSON. Not covered: quality by a judge (`benchmarks.miniature
--weights int8`), and GPUs.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.pages import table
from benchmarks.psnr import psnr
from oneword.engines.graph import Weights
from oneword.engines.open import Backend
from oneword.runtime.bundle import Bundle
from oneword.runtime.drawing import draw
from oneword.runtime.model import Model

CPU = (Backend.ONNXRUNTIME.value, Backend.OPENVINO.value)


def main() -> None:
    """Draws with every bundle and engine; prints a table and one line of JSON."""
    options = _options()
    if options.picture:
        print(json.dumps(draw_and_save(options)))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, float]] = {}
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
    head = ["", "on disk, MiB", "peak of the first start, MiB", "of the second", "seconds", "PSNR to the first, dB"]
    print(table(head, [[name, *(f"{value:.4g}" for value in result.values())] for name, result in results.items()]))
    print(json.dumps(results))


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
    parser.add_argument("--picture", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
