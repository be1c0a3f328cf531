"""Denoise steps of full size with random weights: exported, checked against PyTorch, measured.

    python -m benchmarks.full_size [sd15 sd2 sdxl ldm ...] [--precision fp32 fp16] [--write]
    python -m benchmarks.full_size --plans [...]       TensorRT-RTX plans of the same, built without a GPU

One process creates a step, runs it once in PyTorch and traces it; another opens it in ONNX Runtime, as a machine with
memory for one copy of the weights must. Columns: parameters, seconds to export, peak memory of export and check, size
on disk, and the largest relative difference of the step between PyTorch and ONNX Runtime. `--write` puts the table into
docs/results/gpu.md. Ends in one line of JSON. Not covered: pictures (random weights draw none) and speed.

`tiny` is a model of toy size, to check that this benchmark runs.
"""

import argparse
import json
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.pages import RESULTS, empty_page, marked, provenance, table, write_section

PAGE = RESULTS / "gpu.md"
NEW_PAGE = empty_page(
    "Full size and GPUs",
    "Denoise steps of full size with random weights: exports, plans, and latency on a GPU.",
    "full-size",
    "full-size-plans",
    "gpu-plan",
    "gpu-latency",
)
LIMIT_GIB = 20
TARGET = "sm89"
LINEAR: dict[str, Any] = {"use_linear_projection": True}
SD: dict[str, Any] = {"sample_size": 64, "attention_head_dim": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": {**SD, "cross_attention_dim": 768},
    "sd2": {**SD, **LINEAR, "sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20)},
    "sdxl": {
        **LINEAR,
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "tiny": {
        **SD,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
    },
    "ldm": {**SD, "sample_size": 32, "cross_attention_dim": 1280},
}
"""The UNets of SD 1.5, SD 2.1, SDXL 1.0 and ldm-text2im-large-256, without UNet2DConditionModel's defaults."""
SHAPE = {"B": 1, "N": 2, "M": 2, "T": 77, "h": 32, "w": 32}


def main() -> None:
    """Measures every model in every precision; prints a table and one line of JSON."""
    options = _options()
    if options.stage:
        print(json.dumps({"export": _export, "check": _check, "plan": _plan}[options.stage](options)))
        return
    if options.plans:
        _plans(options)
        return
    results = _measured(options, "export", "check")
    rows = [
        [
            name,
            f"{r['parameters'] / 1e6:.1f} M",
            f"{r['export_seconds']:.0f} s",
            marked(f"{r['export_gib']:.1f} GiB", r["export_gib"] <= LIMIT_GIB),
            marked(f"{r['check_gib']:.1f} GiB", r["check_gib"] <= LIMIT_GIB),
            f"{r['disk_gib']:.1f} GiB",
            f"{r['difference']:.1e}",
        ]
        for name, r in results.items()
    ]
    head = ["denoise step", "parameters", "export", "peak, export", "peak, check", "on disk", "relative difference"]
    print(table(head, rows))
    if options.write:
        text = f"{provenance('full_size')}\n\nTarget: at most {LIMIT_GIB} GiB.\n\n{table(head, rows)}"
        write_section(PAGE, "full-size", text, NEW_PAGE)
    print(json.dumps(results))
    if any(max(r["export_gib"], r["check_gib"]) > LIMIT_GIB for r in results.values()):
        raise SystemExit(f"peak memory was above {LIMIT_GIB} GiB")


def _measured(options: argparse.Namespace, *stages: str) -> dict[str, dict[str, float]]:
    """The stages' measurements of every model in every precision; every stage has its own process."""
    results: dict[str, dict[str, float]] = {}
    for family in options.families:
        for precision in options.precision:
            result = results[f"{family} {precision}"] = {}
            with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
                for stage in stages:
                    result |= _stage(stage, family, precision, folder)
            print(f"{family} {precision}: {result}", flush=True)
    return results


def _plans(options: argparse.Namespace) -> None:
    """Measures the plan of every model in every precision; prints a table and one line of JSON."""
    results = _measured(options, "plan")
    rows = [
        [name, f"{r['plan_seconds']:.0f} s", f"{r['plan_gib']:.1f} GiB", f"{r['plan_disk_gib']:.1f} GiB"]
        for name, r in results.items()
    ]
    text = table([f"plan for {TARGET}", "built in", "peak of the builder", "on disk"], rows)
    print(text)
    if options.write:
        write_section(PAGE, "full-size-plans", f"{provenance('full_size')}\n\n{text}", NEW_PAGE)
    print(json.dumps(results))


def _export(options: argparse.Namespace) -> dict[str, float]:
    """Runs in a child process: computes the reference, then writes the ONNX graph."""
    from oneword.export.parity import references
    from oneword.export.write import write_graph

    start = time.perf_counter()
    graph = full_size(options.families[0], options.precision[0])
    folder = Path(options.scratch)
    cases = references(graph, [SHAPE])
    written = write_graph(graph, folder)
    (folder / "case.pickle").write_bytes(pickle.dumps((written, cases)))  # for the next stage
    return {
        "parameters": sum(p.numel() for p in graph.module.parameters()),
        "export_seconds": time.perf_counter() - start,
        "export_gib": _peak(),
        "disk_gib": sum((folder / name).stat().st_size for name in written.files) / 2**30,
    }


def _check(options: argparse.Namespace) -> dict[str, float]:
    """Runs in a child process without PyTorch weights: compares ONNX Runtime with the reference."""
    from oneword.engines.onnxruntime import OnnxRuntimeEngine
    from oneword.export.parity import compare

    folder = Path(options.scratch)
    graph, cases = pickle.loads((folder / "case.pickle").read_bytes())
    start = time.perf_counter()
    engine = OnnxRuntimeEngine("denoise_step", graph, folder)
    differences = compare(engine, cases, graph.precision)
    return {
        "check_seconds": time.perf_counter() - start,
        "check_gib": _peak(),
        "difference": max(d.value for d in differences if d.unit == "relative"),
    }


def _plan(options: argparse.Namespace) -> dict[str, float]:
    """Runs in a child process: writes the ONNX graph, frees the weights and builds the plan in another child."""
    from oneword.engines.builder import Flavour
    from oneword.runtime.profiles import PlanLimits, build_plans

    folder = Path(options.scratch)
    bundle = bundle_of_one(options.families[0], options.precision[0], folder)
    start = time.perf_counter()
    side = 8 * int(CONFIGS[options.families[0]]["sample_size"])
    plans = build_plans(bundle, Flavour.RTX, TARGET, PlanLimits(max_batch=1, max_size=side), only="denoise_step")
    return {
        "plan_seconds": time.perf_counter() - start,
        "plan_gib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20,
        "plan_disk_gib": sum(plan.stat().st_size for plan in plans["denoise_step"]) / 2**30,
    }


def full_size(family: str, precision: str) -> Any:
    """A denoise step of full size with random weights, scaled to preserve the size of activations."""
    import torch
    from diffusers import UNet2DConditionModel

    from oneword.engines.graph import Precision
    from oneword.export.families import TORCH_DTYPES, denoise_graph
    from oneword.export.modules import DenoiseStep, UNet

    config = CONFIGS[family]
    with torch.device("meta"):
        unet = torch.nn.Module.to(UNet2DConditionModel(**config), TORCH_DTYPES[Precision(precision)])
    unet = unet.to_empty(device="cpu").eval().requires_grad_(False)
    torch.manual_seed(0)
    for parameter in unet.parameters():
        if parameter.ndim == 1:
            parameter.zero_()
        else:
            parameter.normal_(0, float(parameter[0].numel()) ** -0.5)
    for module in unet.modules():
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            module.weight.fill_(1)
    if "addition_embed_type" not in config:
        return denoise_graph(DenoiseStep(UNet(unet)))
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    return denoise_graph(DenoiseStep(UNet(unet)), pooled, 6)


def bundle_of_one(family: str, precision: str, folder: Path) -> Any:
    """The exported step as a bundle of one graph, which is all an engine reads; exported if it does not exist yet."""
    import msgspec

    from oneword.engines.graph import Graph
    from oneword.export.modules import DenoiseStep
    from oneword.export.write import write_graph
    from oneword.runtime.bundle import Bundle, Conditioning, Defaults, Encoder, Manifest, Provenance, Vae

    path = folder / "graph.json"
    if path.is_file():
        graph = msgspec.json.decode(path.read_bytes(), type=Graph)
    else:
        graph = write_graph(full_size(family, precision), folder)
        path.write_bytes(msgspec.json.encode(graph))
    encoder = Encoder(
        graph="text_encoder", table="", tokenizer="", vocab_size=1, width=1,
        hidden_width=1, length=SHAPE["T"], bos_id=0, eos_id=0, pad_id=0, layers=(1,), default_layer=1,
    )  # fmt: skip
    side = 8 * int(CONFIGS[family]["sample_size"])
    manifest = Manifest(
        source=Provenance(family, ""),
        graphs={"denoise_step": graph},
        encoders=(encoder,),
        conditioning=Conditioning((("text_encoder",),)),
        columns=DenoiseStep.COLUMNS,
        scheduler={},
        vae=Vae(scale=1.0, shift=0.0, factor=8, latent_channels=4),
        defaults=Defaults(width=side, height=side),
    )
    return Bundle(folder, manifest)


def _stage(stage: str, family: str, precision: str, folder: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.full_size", family, "--precision", precision]
    run = subprocess.run([*command, "--stage", stage, "--scratch", folder], stdout=subprocess.PIPE, check=True)
    result: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return result


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=["sd15", "sd2", "sdxl", "ldm"], metavar="sd15|sd2|sdxl|ldm|tiny")
    parser.add_argument("--precision", nargs="+", default=["fp16", "fp32"], choices=["fp32", "fp16"])
    parser.add_argument("--plans", action="store_true", help=f"build TensorRT-RTX plans for {TARGET} instead")
    parser.add_argument("--write", action="store_true", help="write the table into docs/results/gpu.md")
    parser.add_argument("--scratch", help="folder for temporary graphs: 12 GB of free space")
    parser.add_argument("--stage", choices=["export", "check", "plan"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := [family for family in options.families if family not in CONFIGS]:
        parser.error(f"unknown model {unknown[0]!r}: choose from {', '.join(CONFIGS)}")
    return options


if __name__ == "__main__":
    main()
