"""Networks of full size with random weights: exported, checked against PyTorch, measured.

    python -m benchmarks.full_size [sd15 sd2 sdxl ldm ...] [--precision fp32 fp16] [--write]
    python -m benchmarks.full_size --plans [...]       TensorRT-RTX plans of the same, built without a GPU
    python -m benchmarks.full_size sd35-medium t5-xxl flux-dev@1 flux-dev@2 --keep DIR [--stages export]

One process creates a network, runs it once in PyTorch and traces it; another opens it in ONNX Runtime, as a machine
with memory for one copy of the weights must. Columns: parameters, seconds to export, peak memory of export and check,
size on disk, seconds of one call in ONNX Runtime, and the largest relative difference from PyTorch.

A transformer may have fewer layers: `flux-dev@2`. From two such numbers of layers the whole model is computed on paper,
by a straight line. `--keep` keeps graphs and the measurements of finished stages in a folder: the same command
continues from there, and `--stages` runs some of the stages now and the others another time. `--write` puts the tables
into docs/results/gpu.md. Ends in one line of JSON. Not covered: pictures (random weights draw none).

`tiny` and `tiny-flow` are models of toy size, to check that this benchmark runs.
"""

import argparse
import json
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks.architectures import CONFIGS, FLOW, LAYERS, TEXT, bundle_of_one, check, full_size, shape, side, split
from benchmarks.pages import RESULTS, empty_page, marked, provenance, table, write_section

PAGE = RESULTS / "gpu.md"
NEW_PAGE = empty_page(
    "Full size and GPUs",
    "Networks of full size with random weights: exports, plans, and latency on a GPU.",
    "full-size",
    "full-size-transformers",
    "full-size-plans",
    "full-size-transformers-plans",
    "gpu-plan",
    "gpu-latency",
)
LIMIT_GIB = 20
STAGES = ("export", "check")
HEAD = ["network", "parameters", "export", "peak, export", "peak, check", "on disk", "a call", "relative difference"]
Measured = Mapping[str, float]


def main() -> None:
    """Measures every model in every precision; prints tables and one line of JSON."""
    options = _options()
    if options.stage:
        print(json.dumps({"export": _export, "check": _check, "plan": _plan}[options.stage](options)))
        return
    results = _measured(options)
    done = {
        name: result for name, result in results.items() if ("plan_gib" if options.plans else "export_gib") in result
    }
    for section, names in (("full-size", CONFIGS), ("full-size-transformers", FLOW | TEXT)):
        rows = {name: result for name, result in done.items() if split(name.split()[0])[0] in names}
        if rows:
            text = plan_table(rows, options.target) if options.plans else export_table(rows)
            print(text)
            if options.write:
                section += "-plans" if options.plans else ""
                write_section(PAGE, section, f"{provenance('full_size')}\n\n{text}", NEW_PAGE)
    print(json.dumps(results))
    if any(max(r.get("export_gib", 0), r.get("check_gib", 0)) > LIMIT_GIB for r in results.values()):
        raise SystemExit(f"peak memory was above {LIMIT_GIB} GiB")


def export_table(results: Mapping[str, Measured]) -> str:
    """The measurements of exports and checks, by model and precision, and what follows for whole models."""
    measured = {name: _cells(result) for name, result in results.items()}
    paper = {f"{name}, on paper": _cells(result) for name, result in on_paper(results).items()}
    text = table(HEAD, [[name, *cells] for name, cells in (measured | paper).items()])
    return f"Target: at most {LIMIT_GIB} GiB.\n\n{text}"


def _cells(r: Measured) -> list[str]:
    exported = [
        f"{r['parameters'] / 1e6:.1f} M",
        f"{r['export_seconds']:.0f} s",
        marked(f"{r['export_gib']:.1f} GiB", r["export_gib"] <= LIMIT_GIB),
    ]
    disk = f"{r['disk_gib']:.1f} GiB"
    if "check_gib" not in r:
        return [*exported, "not run", disk, "", ""]
    check = marked(f"{r['check_gib']:.1f} GiB", r["check_gib"] <= LIMIT_GIB)
    call = f"{r['call_seconds']:.2g} s" if r["call_seconds"] < 10 else f"{r['call_seconds']:.0f} s"
    return [*exported, check, disk, call, f"{r['difference']:.1e}" if "difference" in r else ""]


def plan_table(results: Mapping[str, Measured], target: str) -> str:
    """The measurements of plans, by model and precision."""
    rows = [
        [name, f"{r['plan_seconds']:.0f} s", f"{r['plan_gib']:.1f} GiB", f"{r['plan_disk_gib']:.1f} GiB"]
        for name, r in results.items()
    ]
    return table([f"plan for {target}", "built in", "peak of the builder", "on disk"], rows)


def on_paper(results: Mapping[str, Measured]) -> dict[str, dict[str, float]]:
    """Whole models of which two numbers of layers were measured, by a straight line through both.

    For models whose layers are alike: parameters, time and memory are a constant and a multiple of their number. There
    is no such rule for the difference.
    """
    depths: dict[str, list[tuple[int, Measured]]] = {}
    for name, result in results.items():
        full_name, precision = name.split()
        model, layers = split(full_name)
        if layers is not None:
            depths.setdefault(f"{model} {precision}", []).append((layers, result))
    whole: dict[str, dict[str, float]] = {}
    for name, measured in depths.items():
        if len(measured) > 1:
            (fewer, low), *_, (more, high) = sorted(measured, key=lambda pair: pair[0])
            times = (LAYERS[name.split()[0]] - fewer) / (more - fewer)
            keys = (key for key in low if key in high and key != "difference")
            whole[name] = {key: low[key] + times * (high[key] - low[key]) for key in keys}
    return whole


def _measured(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The stages' measurements of every model in every precision; every stage has its own process."""
    stages = ("plan",) if options.plans else options.stages
    results: dict[str, dict[str, float]] = {}
    for name in options.models:
        for precision in options.precision:
            result = results[f"{name} {precision}"] = {}
            if options.keep is None:
                with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
                    for stage in stages:
                        result |= _stage(stage, name, precision, Path(folder), options.target)
            else:
                folder = options.keep / f"{name}-{precision}"
                folder.mkdir(parents=True, exist_ok=True)
                for stage in stages:
                    _stage(stage, name, precision, folder, options.target)
                for part in ("export", "check", f"plan-{options.target}"):  # also those that ran before
                    if (file := folder / f"measured-{part}.json").is_file():
                        result |= json.loads(file.read_text())
    return results


def _stage(stage: str, name: str, precision: str, folder: Path, target: str) -> dict[str, float]:
    """The measurements of one stage, which runs in a process of its own unless its folder has them already."""
    file = folder / f"measured-{stage}{f'-{target}' if stage == 'plan' else ''}.json"
    if not file.is_file():
        command = [sys.executable, "-m", "benchmarks.full_size", name, "--precision", precision, "--target", target]
        run = subprocess.run([*command, "--stage", stage, "--scratch", folder], stdout=subprocess.PIPE, check=True)
        file.write_bytes(run.stdout.splitlines()[-1])
    result: dict[str, float] = json.loads(file.read_text())
    print(f"{name} {precision}, {stage}: {result}", flush=True)
    return result


def _export(options: argparse.Namespace) -> dict[str, float]:
    """Runs in a child process: computes the reference, then writes the ONNX graph."""
    import msgspec

    from oneword.export.parity import references
    from oneword.export.write import write_graph

    start = time.perf_counter()
    name, folder = options.models[0], Path(options.scratch)
    graph = full_size(name, options.precision[0])
    cases = references(graph, [shape(name)])
    written = write_graph(graph, folder)
    (folder / "case.pickle").write_bytes(pickle.dumps((written, cases)))  # for the next stage
    (folder / "graph.json").write_bytes(msgspec.json.encode(written))  # for plans
    return {
        "parameters": sum(p.numel() for p in graph.module.parameters()),
        "export_seconds": time.perf_counter() - start,
        "export_gib": _peak(),
        "disk_gib": sum((folder / file).stat().st_size for file in written.all_files) / 2**30,
    }


def _check(options: argparse.Namespace) -> dict[str, float]:
    """Runs in a child process without PyTorch weights: compares ONNX Runtime with the reference."""
    from oneword.engines.onnxruntime import OnnxRuntimeEngine
    from oneword.export.parity import compare

    folder = Path(options.scratch)
    graph, cases = pickle.loads((folder / "case.pickle").read_bytes())
    start = time.perf_counter()
    engine = OnnxRuntimeEngine("network", graph, folder)
    differences = compare(engine, cases, graph.precision)
    checked = time.perf_counter()
    engine.run(cases[0].feeds)
    return {
        "check_seconds": checked - start,
        "call_seconds": time.perf_counter() - checked,
        "check_gib": _peak(),
        "difference": max(d.value for d in differences if d.unit == "relative"),
    }


def _plan(options: argparse.Namespace) -> dict[str, float]:
    """Runs in a child process: writes the ONNX graph, frees the weights and builds the plan in another child."""
    from oneword.engines.builder import Flavour
    from oneword.runtime.profiles import PlanLimits, build_plans

    name = options.models[0]
    bundle = bundle_of_one(name, options.precision[0], Path(options.scratch))
    start = time.perf_counter()
    limits = PlanLimits(max_batch=1, max_size=side(name))
    plans = build_plans(bundle, Flavour.RTX, options.target, limits, only="denoise_step")
    return {
        "plan_seconds": time.perf_counter() - start,
        "plan_gib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20,
        "plan_disk_gib": sum(plan.stat().st_size for plan in plans["denoise_step"]) / 2**30,
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = "|".join(CONFIGS | FLOW | TEXT)
    parser.add_argument("models", nargs="*", default=["sd15", "sd2", "sdxl", "ldm"], metavar=names)
    parser.add_argument("--precision", nargs="+", default=["fp16", "fp32"], choices=["fp32", "fp16"])
    parser.add_argument("--plans", action="store_true", help="build TensorRT-RTX plans instead")
    parser.add_argument("--target", default="sm89", help="the plans' GPUs, such as sm89,sm120 [default: sm89]")
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES, help="stages to run now [default: all]")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep graphs and measurements, and continue from them")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/results/gpu.md")
    parser.add_argument("--scratch", help="folder for temporary graphs: 12 GB of free space")
    parser.add_argument("--stage", choices=[*STAGES, "plan"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name in options.models:
        try:
            check(name)
        except ValueError as error:
            parser.error(str(error))
    if options.plans and (text := [name for name in options.models if split(name)[0] in TEXT]):
        parser.error(f"--plans is for denoise steps, {text[0]} is a text encoder")
    return options


if __name__ == "__main__":
    main()
