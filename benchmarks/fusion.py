"""A guided step in ONNX Runtime on the CPU: the exported graph, its fused copy, and diffusers' own UNet in PyTorch.

    python -m benchmarks.fusion BUNDLE --size 256 --model MODEL    MODEL: the UNet's pipeline, for diffusers; optional

All are open in one process and run in turn, in the reverse order every other round (A B C, C B A, ...), so that a
machine that gets slower or faster does so for all. diffusers runs only the UNet, for two branches, in fp32 with its
default attention. Reported are medians of elapsed and of processor time, the latter's quotient to the graph, and the
load of the machine during the rounds, this benchmark included. On a busy machine only processor time means something,
and that with `--threads 1`. Peak memory is that of a process which opens and runs one contender. Ends in one line of
JSON. Not covered: text encoders and decoders, which run once per picture; GPUs.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.pages import table
from benchmarks.roof import step_shapes
from oneword.engines.engine import numpy_dtype
from oneword.engines.onnxruntime import OnnxRuntimeEngine
from oneword.runtime.bundle import Bundle

GRAPH, FUSED, DIFFUSERS = "graph", "fused copy", "diffusers"


def main() -> None:
    """Measures all contenders; prints a table and one line of JSON."""
    options = _options()
    if options.alone:
        contender(options.alone, options)()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    names = [GRAPH, FUSED, *([DIFFUSERS] if options.model else [])]
    peaks = {name: _alone(name) for name in names}
    runs = {name: contender(name, options) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    spent: dict[str, list[float]] = {name: [] for name in names}
    loads = []
    for number in range(options.rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            start, used = time.perf_counter(), time.process_time()
            runs[name]()
            spent[name].append(1e3 * (time.process_time() - used))
            times[name].append(1e3 * (time.perf_counter() - start))
        loads.append(os.getloadavg()[0])
    elapsed, processor = ({name: statistics.median(t) for name, t in kind.items()} for kind in (times, spent))
    rows = [
        [name, f"{elapsed[name]:.4g}", f"{value:.4g}", f"{value / processor[GRAPH]:.3f}", f"{peaks[name]:.0f}"]
        for name, value in processor.items()
    ]
    print(table(["", "ms per step", "processor, ms", "relative to the graph", "peak MiB"], rows))
    print(f"{options.rounds} rounds, {options.threads} threads, load {min(loads):.1f} to {max(loads):.1f}")
    print(json.dumps({"ms": elapsed, "processor_ms": processor, "peak_mib": peaks, "load": [min(loads), max(loads)]}))


def contender(name: str, options: argparse.Namespace) -> Callable[[], object]:
    """Opens a contender and runs it once."""
    run = diffusers_unet(options) if name == DIFFUSERS else step(name, options)
    run()
    return run


def step(name: str, options: argparse.Namespace) -> Callable[[], object]:
    """The denoise step of the bundle, in its fused copy or without it."""
    bundle = Bundle.open(options.bundle)
    graph, shapes = bundle.graph("denoise_step"), step_shapes(bundle.manifest, options.size)
    if name == GRAPH:
        graph = msgspec.structs.replace(graph, fused={})
    elif not graph.fused:
        raise SystemExit(f"{options.bundle} has no fused copy of its denoise step: export it again")
    generator = np.random.default_rng(0)
    feeds = {spec.name: np.zeros(shapes[spec.name], numpy_dtype(spec.dtype)) for spec in graph.inputs}
    for key in ("sample", "context"):
        feeds[key] = generator.standard_normal(shapes[key], dtype=np.float32)
    feeds["schedule"][:] = 0.5  # so that the outputs depend on the network
    feeds["schedule"][:, 0] = 500  # the timestep
    feeds["branch_context"][1], feeds["cond_branch"][0] = 1, 1
    engine = OnnxRuntimeEngine("denoise_step", graph, options.bundle, options.threads)
    return lambda: engine.run(feeds)


def diffusers_unet(options: argparse.Namespace) -> Callable[[], object]:
    """Two branches of the pipeline's UNet."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.set_num_threads(options.threads)
    unet: Any = UNet2DConditionModel.from_pretrained(options.model, subfolder="unet").eval()
    shapes = step_shapes(Bundle.open(options.bundle).manifest, options.size)
    sample, context = torch.randn(2, *shapes["sample"][1:]), torch.randn(shapes["context"])

    @torch.no_grad()
    def run() -> object:
        return unet(sample, 500, context, return_dict=False)

    return run


def _alone(name: str) -> float:
    """Peak memory of a process that opens and runs one contender, in MiB."""
    line = [sys.executable, "-m", "benchmarks.fusion", *sys.argv[1:], "--alone", name]
    return float(subprocess.run(line, stdout=subprocess.PIPE, check=True).stdout.split()[-1])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--model", type=Path, help="the pipeline's diffusers directory; default: without diffusers")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--alone", choices=[GRAPH, FUSED, DIFFUSERS], help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
