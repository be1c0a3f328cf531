"""Where the time of a step goes: the layers of OpenVINO and ONNX Runtime by kind, as their own counters report them.

    python -m benchmarks.layers BUNDLE --size 256 [--write]    a guided step of one picture
    python -m benchmarks.layers BUNDLE --size 256 --peer build/latency/sd15/genai/unet/openvino_model.xml

Each engine runs in its own process with its counters on: ONNX Runtime in float32, opened by oneword; OpenVINO with the
settings that oneword's engine has for graphs with float weights, compiled for this size from the same conversion: in
bfloat16 from fp16 weights if the processor has it, otherwise in float32 (the engine compiles a small graph, such as the
miniature's, without converting it). `--peer` is the same UNet without a sampler, in OpenVINO's format, such as
benchmarks.latency converts for OpenVINO GenAI; its settings are those of ours. A kind is an operator with the kernel
that runs it. The runs after the first are averaged. The products' share of the roof is the time that their arithmetic
takes at the machine's measured peak (benchmarks.roof), divided by the time that the kinds with products take. Counters
cost a little time themselves. `--write` puts the tables into docs/results/latency.md, or latency-float32.md on a
processor without bfloat16. Ends in one line of JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks import openvino_cpu
from benchmarks.formats import converted
from benchmarks.latency import NEW_PAGE, page_of
from benchmarks.pages import model_name, provenance, table, write_section
from benchmarks.roof import floors, peaks, step_of, step_shapes
from oneword.engines.graph import Graph
from oneword.runtime.bundle import Bundle

ENGINES = ("openvino", "onnxruntime")
PEER = "peer's UNet in openvino"
SHOWN = 12
"""Kinds of a table; the others are summed up."""
PRODUCTS = {
    "Attention", "Conv", "Convolution", "FullyConnected", "FusedConv", "FusedMatMul", "Gemm", "MatMul",
    "MultiHeadAttention", "NhwcConv", "NhwcFusedConv", "ScaledDotProductAttention",
}  # fmt: skip
"""Operators that consist of products, as either engine calls them."""

Kinds = dict[str, list[float]]
"""Number of layers and milliseconds per step, by kind."""


def main() -> None:
    """Measures both engines; prints a table for each and one line of JSON."""
    options = _options()
    if options.engine:
        print(json.dumps(counted(options)))
        return
    results: dict[str, Kinds] = {}
    for engine in (*ENGINES, *([PEER] if options.peer else [])):
        line = [sys.executable, "-m", "benchmarks.layers", options.bundle, "--engine", engine, "--size", options.size]
        line += ["--threads", options.threads, "--runs", options.runs, "--work", options.work]
        line += ["--peer", options.peer] if options.peer else []
        run = subprocess.run([*map(str, line)], stdout=subprocess.PIPE, check=True)
        results[engine] = json.loads(run.stdout.splitlines()[-1])
    least = floors(step_of(options.bundle, options.size), peaks(options.threads))
    shares = {
        engine: products_share(kinds, least["f32"] if engine == "onnxruntime" else least.get("bf16", least["f32"]))
        for engine, kinds in results.items()
    }
    text = "\n\n".join(kinds_table(engine, kinds, shares[engine]) for engine, kinds in results.items())
    print(text)
    if options.write:
        model = model_name(Bundle.open(options.bundle).manifest.source.id)
        about = f"A guided step of {model} at {options.size}x{options.size}, {options.threads} threads."
        write_section(page_of(), "layers", f"{provenance('layers')}\n\n{about}\n\n{text}", NEW_PAGE)
    print(json.dumps({"kinds": results, "products over the roof": shares}))


def counted(options: argparse.Namespace) -> Kinds:
    """Runs in an engine's own process."""
    from oneword.engines.engine import numpy_dtype

    bundle = Bundle.open(options.bundle)
    graph, shapes = bundle.graph("denoise_step"), step_shapes(bundle.manifest, options.size)
    if options.engine == PEER:
        return _peer(shapes, options)
    feeds = {}
    for spec in graph.inputs:
        dtype = numpy_dtype(spec.dtype)
        feeds[spec.name] = np.full(shapes[spec.name], 0 if dtype == np.int64 else 0.1, dtype)
    if options.engine == "openvino":
        return _openvino(bundle.file(graph.files[0]), feeds, options.work / graph.digest[:12], options)
    return _onnxruntime(graph, options.bundle, feeds, options)


def _openvino(path: Path, feeds: Mapping[str, Any], work: Path, options: argparse.Namespace) -> Kinds:
    import openvino

    core = openvino.Core()
    halve = openvino_cpu.precision_of(core) == "bf16"
    return _compiled(core, core.read_model(converted(core, path, work, halve=halve)), feeds, options)


def _peer(shapes: Mapping[str, Sequence[int]], options: argparse.Namespace) -> Kinds:
    """The UNet of an SD 1.x or 2.x. `shapes` are those of our step: two branches of one picture."""
    import openvino

    core = openvino.Core()
    model = core.read_model(options.peer)
    _, _, *side = shapes["sample"]
    _, tokens, width = shapes["context"]
    peers = {"sample": (2, shapes["sample"][1], *side), "timestep": (), "encoder_hidden_states": (2, tokens, width)}
    feeds = {
        name: np.full(peers[name], 0.1, port.get_element_type().to_dtype())
        for port in model.inputs
        for name in [port.get_any_name()]
    }
    return _compiled(core, model, feeds, options)


def _compiled(core: Any, model: Any, feeds: Mapping[str, Any], options: argparse.Namespace) -> Kinds:
    model.reshape({name: list(value.shape) for name, value in feeds.items()})
    settings = {**openvino_cpu.settings(openvino_cpu.precision_of(core), options.threads), "PERF_COUNT": "YES"}
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    runs = []
    for _ in range(options.runs + 1):
        request.infer(feeds)
        runs.append([(layer.node_type, layer.exec_type, layer.real_time) for layer in request.profiling_info])
    return by_kind(
        [[(f"{kind} ({kernel})", 1e3 * time.total_seconds()) for kind, kernel, time in run if time] for run in runs[1:]]
    )


def _onnxruntime(graph: Graph, bundle: Path, feeds: Mapping[str, Any], options: argparse.Namespace) -> Kinds:
    import onnxruntime

    from oneword.engines.onnxruntime import OnnxRuntimeEngine

    sessions: list[Any] = []
    open_session = onnxruntime.InferenceSession

    def opened(path: str, settings: Any, **more: Any) -> Any:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(Path(folder) / "profile")
        sessions.append(open_session(path, settings, **more))
        return sessions[-1]

    with tempfile.TemporaryDirectory() as folder:
        with patch.object(onnxruntime, "InferenceSession", opened):
            engine = OnnxRuntimeEngine("denoise_step", graph, bundle, options.threads)
        for _ in range(options.runs + 1):
            engine.run(feeds)
        events = json.loads(Path(sessions[0].end_profiling()).read_text())
    return by_kind(runs_of(events)[1:])


def runs_of(events: Iterable[Mapping[str, Any]]) -> list[list[tuple[str, float]]]:
    """The operators of each run in ONNX Runtime's profile, with their milliseconds: a node's n-th event is of run n."""
    runs: list[list[tuple[str, float]]] = []
    count: dict[str, int] = defaultdict(int)
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        number = count[event["name"]]
        count[event["name"]] += 1
        if number == len(runs):
            runs.append([])
        runs[number].append((event["args"]["op_name"], event["dur"] / 1e3))
    return runs


def by_kind(runs: Sequence[Sequence[tuple[str, float]]]) -> Kinds:
    """Layers of a run and mean milliseconds by kind, the slowest first."""
    totals: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for run in runs:
        for kind, milliseconds in run:
            totals[kind] += milliseconds
            counts[kind] += 1
    ordered = sorted(totals, key=lambda kind: -totals[kind])
    return {kind: [counts[kind] / len(runs), totals[kind] / len(runs)] for kind in ordered}


def products_share(kinds: Kinds, floor: float) -> float:
    """The seconds `floor` that the products take at least, divided by those of the kinds that consist of products."""
    milliseconds = sum(ms for kind, (_, ms) in kinds.items() if kind.partition(" ")[0] in PRODUCTS)
    return 1e3 * floor / milliseconds if milliseconds else 0.0


def kinds_table(engine: str, kinds: Kinds, products: float) -> str:
    """The slowest kinds of one engine in Markdown, the others in one row."""
    total = sum(ms for _, ms in kinds.values())
    shown, hidden = [*kinds.items()][:SHOWN], [*kinds.values()][SHOWN:]
    sums = [sum(count for count, _ in hidden), sum(ms for _, ms in hidden)]
    lines = [*shown, *([(f"{len(hidden)} other kinds", sums)] if hidden else [])]
    rows = [[kind, f"{count:.0f}", f"{ms:.2f}", f"{ms / total:.1%}"] for kind, (count, ms) in lines]
    layers = sum(count for count, _ in kinds.values())
    rows.append([f"all; products reach {products:.0%} of the roof", f"{layers:.0f}", f"{total:.2f}", ""])
    return table([engine, "layers", "ms", "share"], rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--runs", type=int, default=3, help="steps that are averaged, after one to warm up")
    parser.add_argument("--work", type=Path, default=Path("build/formats"), help="folder for converted graphs")
    parser.add_argument("--write", action="store_true", help="write the tables into the page of latency")
    parser.add_argument("--peer", type=Path, help="the UNet of an SD 1.x or 2.x, as optimum-cli converts it")
    parser.add_argument("--engine", choices=(*ENGINES, PEER), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
