"""`ti-export MODEL BUNDLE`: a thin skin over export_bundle."""

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from oneword.engines.builder import Flavour, installed_version, target_of
from oneword.engines.graph import Precision
from oneword.runtime.cli import size
from oneword.runtime.commands import run_command
from oneword.runtime.profiles import PlanLimits, build_plans


def lora(value: str) -> tuple[Path, float]:
    """`style.safetensors:0.8` as a file and a scale; 1 where none is given."""
    name, colon, scale = value.rpartition(":")
    try:
        if colon and not math.isfinite(float(scale)):
            raise ValueError
        return (Path(name), float(scale)) if colon else (Path(value), 1.0)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not FILE or FILE:SCALE, for example style.safetensors:0.8") from None


@click.command()
@click.argument("model")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="For MODEL a single .safetensors file: a diffusers directory of its kind, whose weights are not read.",
)
@click.option(
    "--lora",
    "loras",
    type=lora,
    multiple=True,
    metavar="FILE[:SCALE]",
    help="A LoRA to be fused into the model; may be repeated.",
)
@click.option(
    "--precision",
    type=click.Choice([p.value for p in Precision]),
    default=Precision.FP32.value,
    show_default=True,
    help="What the networks compute in; the sampler's state stays float32.",
)
@click.option(
    "--engine",
    type=click.Choice(["onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"]),
    default="onnxruntime",
    show_default=True,
    help="What the bundle is for; the TensorRTs have plans built ahead of time.",
)
@click.option(
    "--target",
    default="sm89",
    show_default=True,
    help="GPU that the plans are for, or several: sm89,sm120 (TensorRT only).",
)
@click.option("--max-batch", type=click.IntRange(1), default=4, show_default=True, help="Most pictures a plan takes.")
@click.option("--max-size", type=click.IntRange(8), help="Longest side a plan takes, in pixels; else the model's own.")
@click.option(
    "--static-size",
    "static_sizes",
    type=size,
    multiple=True,
    metavar="WxH",
    help="A size that gets plans of its own, faster there; may be repeated (TensorRT only).",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")
def command(
    model: str,
    bundle: Path,
    config: Path | None,
    loras: tuple[tuple[Path, float], ...],
    precision: str,
    engine: str,
    target: str | None,
    max_batch: int,
    max_size: int | None,
    static_sizes: tuple[tuple[int, int], ...],
    as_json: bool,
) -> None:
    """Compile MODEL, a diffusers directory, a hub id, a single .safetensors file or the word `miniature`, into the
    folder BUNDLE.

    Every graph is compared with PyTorch on fresh inputs before the bundle appears.
    """
    started = time.perf_counter()
    console = Console(stderr=True)
    silence_libraries()
    from oneword.export.source import Lora  # torch: after --help has been answered
    from oneword.export.write import export_bundle

    plans: dict[str, list[Path]] = {}
    limits = PlanLimits(max_batch, max_size, static_sizes)
    flavour = Flavour(engine) if engine.startswith("tensorrt") else None
    if flavour is not None:  # before the long work
        installed_version(flavour)
        target = target_of(flavour, target)
    with console.status(f"exporting {model}") as status:

        def report(message: str) -> None:
            elapsed = time.perf_counter() - started
            status.update(message)
            console.print(f"[dim]{elapsed:6.1f} s[/dim]  {message}", highlight=False)

        def accept(exportable: Any) -> None:
            if flavour is not None:
                limits.check(exportable.vae, exportable.defaults)

        exported = export_bundle(
            model,
            bundle,
            precision=Precision(precision),
            config=config,
            loras=[Lora(*each) for each in loras],
            report=report,
            accept=accept,
        )
        if flavour is not None:
            report(f"building plans with {flavour} for {target}")
            plans = build_plans(exported.bundle, flavour, target, limits, report)
    seconds = time.perf_counter() - started
    for difference in exported.differences:
        console.print(f"          {difference}", highlight=False)
    for reason in exported.unchecked:
        console.print(f"          not checked: {reason}", highlight=False)
    if as_json:
        files = {name: [str(path) for path in paths] for name, paths in plans.items()}
        print(json.dumps({**summary(exported, seconds), "engine": engine, "plans": files}, indent=1))
    else:
        console.print(f"wrote {bundle} in {seconds:.1f} s", highlight=False)


def summary(exported: Any, seconds: float) -> dict[str, object]:
    """What `--json` prints."""
    manifest = exported.bundle.manifest
    return {
        "bundle": str(exported.bundle.path),
        "family": exported.family,
        "source": {"id": manifest.source.id, "revision": manifest.source.revision, "digest": manifest.source.digest},
        "graphs": {
            name: {"files": list(graph.files), "digest": graph.digest, "precision": graph.precision.value}
            for name, graph in manifest.graphs.items()
        },
        "differences": [
            {"graph": d.graph, "output": d.output, "value": d.value, "unit": d.unit, "allowed": d.allowed}
            for d in exported.differences
        ],
        "unchecked": list(exported.unchecked),
        "seconds": round(seconds, 3),
    }


def silence_libraries() -> None:
    """What the libraries say about themselves is no news to the user; their errors are raised."""
    for name in ("transformers", "diffusers", "huggingface_hub", "torch.utils._sympy"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main() -> None:
    """The console script."""
    run_command(command, "ti-export")


if __name__ == "__main__":
    main()
