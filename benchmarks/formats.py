"""How OpenVINO opens a large graph fastest and in the least memory: the forms that its weights can have on disk.

    python -m benchmarks.formats BUNDLE --size 256    a guided step of one picture, compiled for one size

    onnx      the exported graph
    exact     OpenVINO's own format with all weights: what the engine keeps as a plan where it computes in float32
    fp16      the same with fp16 weights: what it keeps where it computes in bfloat16
    cached    fp16 with OpenVINO's cache of compiled graphs, which holds the weights again (OPTIMIZE_SPEED)
    cached-small    the same with a cache without weights (OPTIMIZE_SIZE)

Every form is opened twice, in a process of its own, and the second time counts: then the caches exist. `--work` has a
folder for each graph. Peak memory includes mapped files. Not covered: text encoders and decoders. Ends in one line of
JSON.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import openvino_cpu
from benchmarks.pages import table
from benchmarks.roof import step_shapes

FORMS = {"onnx": "", "exact": "", "fp16": "", "cached": "OPTIMIZE_SPEED", "cached-small": "OPTIMIZE_SIZE"}
"""The mode of OpenVINO's cache."""


def main() -> None:
    """Measures every form; prints a table and one line of JSON."""
    options = _options()
    if options.form:
        print(json.dumps(opened(options)))
        return
    results = {}
    for form in FORMS:
        line = [sys.executable, "-m", "benchmarks.formats", options.bundle, "--size", options.size]
        line += ["--threads", options.threads, "--work", options.work, "--form", form]
        for _ in range(2):
            run = subprocess.run([*map(str, line)], stdout=subprocess.PIPE, check=True)
        results[form] = json.loads(run.stdout.splitlines()[-1])
    head = [
        "",
        "compiled in, s",
        "processor time, s",
        "peak MiB, compiled",
        "first step, s",
        "second step, s",
        "peak MiB",
    ]
    print(table(head, [[form, *(f"{value:.4g}" for value in result.values())] for form, result in results.items()]))
    print(json.dumps(results))


def opened(options: argparse.Namespace) -> dict[str, float]:
    """Opens one form in this process and runs it twice."""
    import openvino

    from oneword.engines.engine import numpy_dtype
    from oneword.runtime.bundle import Bundle

    bundle = Bundle.open(options.bundle)
    graph, shapes = bundle.graph("denoise_step"), step_shapes(bundle.manifest, options.size)
    feeds = {spec.name: np.zeros(shapes[spec.name], numpy_dtype(spec.dtype)) for spec in graph.inputs}
    core, path = openvino.Core(), bundle.file(graph.files[0])
    settings = openvino_cpu.settings(openvino_cpu.precision_of(core), options.threads)
    work = options.work / graph.digest[:12]
    if mode := FORMS[options.form]:
        settings |= {"CACHE_DIR": str(work / options.form), "CACHE_MODE": mode}
    if options.form != "onnx":
        path = converted(core, path, work, halve=options.form != "exact")
    start, spent = time.perf_counter(), time.process_time()
    model = core.read_model(path)
    model.reshape({name: list(value.shape) for name, value in feeds.items()})
    compiled = core.compile_model(model, "CPU", settings)
    del model
    result = {"compile_s": time.perf_counter() - start, "cpu_s": time.process_time() - spent, "compiled_mib": _peak()}
    request = compiled.create_infer_request()
    for name in ("first_s", "second_s"):
        start = time.perf_counter()
        request.infer(feeds)
        result[name] = time.perf_counter() - start
    return {**result, "peak_mib": _peak()}


def converted(core: Any, path: Path, work: Path, *, halve: bool = True) -> Path:
    """The graph in OpenVINO's own format, converted unless an earlier run finished doing so."""
    from oneword.engines.openvino_conversion import convert_graph

    folder = work / ("converted" if halve else "converted-exact")
    partial = folder.with_name(f"{folder.name}.partial")
    if not folder.exists():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        convert_graph(core, path, partial / "step.xml", halve=halve)
        partial.rename(folder)
    return folder / "step.xml"


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, default=Path("build/formats"), help="folder for graphs and caches")
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
