"""`ti-export`: exports a model to a bundle. A thin layer over `export_bundle` and `build_plans`."""

import math
import time
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from oneword.engines.builder import Flavour, installed_version, target_of
from oneword.engines.errors import UsageError
from oneword.engines.graph import Precision, Weights
from oneword.runtime.commands import HELP, PATH, ProgressBar, json_option, print_json, run_command, size, version_option
from oneword.runtime.profiles import PlanLimits, build_plans


def lora(value: str) -> tuple[Path, float]:
    """Parses `style.safetensors:0.8` into a file and a scale, 1 by default."""
    name, colon, scale = value.rpartition(":")
    try:
        if colon and not math.isfinite(float(scale)):
            raise ValueError
        return (Path(name), float(scale)) if colon else (Path(value), 1.0)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not FILE or FILE:SCALE, for example style.safetensors:0.8") from None


@click.command(name="ti-export", context_settings=HELP)
@version_option
@click.argument("model")
@click.argument("bundle", type=PATH)
@click.option(
    "--config",
    type=PATH,
    help="Diffusers directory of the same kind of model, if MODEL is a single file; its weights are not read.",
)
@click.option(
    "--lora",
    "loras",
    type=lora,
    multiple=True,
    metavar="FILE[:SCALE]",
    help="LoRA to fuse into the model; may be repeated.",
)
@click.option(
    "--without",
    multiple=True,
    metavar="ENCODER",
    help="Text encoder to leave out: text_encoder_3 (T5) of Stable Diffusion 3.",
)
@click.option(
    "--preview",
    type=PATH,
    help="Diffusers directory of an AutoencoderTiny, such as TAESD's: a decoder for previews and ti-run --draft.",
)
@click.option(
    "--precision",
    type=click.Choice([p.value for p in Precision]),
    default=Precision.FP32.value,
    show_default=True,
    help="Number type the networks compute in; the sampler's state stays float32.",
)
@click.option(
    "--weights",
    type=click.Choice([w.value for w in Weights]),
    default=Weights.FLOAT.value,
    show_default=True,
    help="int8: large weights in a quarter of the size, for CPUs. Pictures change slightly; TensorRT does not run it.",
)
@click.option(
    "--plans",
    "flavour",
    type=click.Choice([flavour.value for flavour in Flavour]),
    help="Also build plans for this backend ahead of time.",
)
@click.option(
    "--target",
    metavar="SM",
    show_default="tensorrt: the GPU of this machine; tensorrt-rtx: sm89",
    help="GPU to build plans for; tensorrt-rtx accepts several: sm89,sm120.",
)
@click.option("--max-batch", type=click.IntRange(1), default=4, show_default=True, help="Largest batch a plan accepts.")
@click.option(
    "--max-size", type=click.IntRange(8), show_default="the model's own", help="Longest side a plan accepts, in pixels."
)
@click.option(
    "--static-size",
    "static_sizes",
    type=size,
    multiple=True,
    metavar="WxH",
    help="Size to build dedicated, faster plans for; may be repeated.",
)
@json_option
@click.pass_context
def command(
    context: click.Context,
    model: str,
    bundle: Path,
    config: Path | None,
    loras: tuple[tuple[Path, float], ...],
    without: tuple[str, ...],
    preview: Path | None,
    precision: str,
    weights: str,
    flavour: str | None,
    target: str | None,
    max_batch: int,
    max_size: int | None,
    static_sizes: tuple[tuple[int, int], ...],
    as_json: bool,
) -> None:
    """Export MODEL to the folder BUNDLE, in place of an older bundle.

    MODEL is a diffusers directory, a hub id, a single .safetensors file or `miniature`. It becomes ONNX graphs, which
    ONNX Runtime and OpenVINO compile when they open them. Every graph is compared with PyTorch on fresh inputs before
    the bundle appears. In bf16, only PyTorch's own results are checked, for NaN and infinity.
    """
    started = time.perf_counter()
    plans = None if flavour is None else Flavour(flavour)
    if plans is None:
        _refuse_plan_options(context)
    else:  # fail before the long work
        if weights == Weights.INT8:
            raise UsageError(f"--weights int8 with --plans {plans}, which does not run int8 weights: drop one of them")
        installed_version(plans)
        target = target_of(plans, target)
    limits = PlanLimits(max_batch, max_size, static_sizes)
    from oneword.export.loras import Lora
    from oneword.export.source import silence_libraries  # imports torch, which --help does not need
    from oneword.export.write import export_bundle

    silence_libraries()
    with ProgressBar(f"exporting {model}") as progress:

        def report(message: str) -> None:
            progress.update(description=message)
            progress.line(f"{time.perf_counter() - started:6.1f} s  {message}")

        def accept(exportable: Any) -> None:
            if plans is not None:
                limits.check(exportable.size_multiple, exportable.defaults, exportable.max_side)

        exported = export_bundle(
            model,
            bundle,
            precision=Precision(precision),
            weights=Weights(weights),
            config=config,
            loras=[Lora(file, scale) for file, scale in loras],
            without=without,
            preview=preview,
            report=report,
            accept=accept,
        )
        paths: dict[str, list[Path]] = {}
        if plans is not None:
            report(f"building plans with {plans} for {target}")
            paths = build_plans(exported.bundle, plans, target, limits, report)
        seconds = time.perf_counter() - started
    warnings = [*exported.warnings, *([] if plans is None else plan_warnings(exported))]
    for line in (*parity_lines(exported), *warnings):
        progress.note(line)
    if not as_json:
        progress.note(f"wrote {bundle} in {seconds:.1f} s")
    if as_json:
        files = {name: [str(path) for path in built] for name, built in paths.items()}
        print_json({**summary(exported, seconds), "warnings": warnings, "target": target, "plans": files})


def _refuse_plan_options(context: click.Context) -> None:
    """Raises UsageError for an option that has no effect without --plans."""
    for name in ("target", "max_batch", "max_size", "static_sizes"):
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            [option] = [parameter.opts[0] for parameter in context.command.params if parameter.name == name]
            raise UsageError(f"{option} has no effect without plans: add --plans tensorrt or --plans tensorrt-rtx")


def summary(exported: Any, seconds: float) -> dict[str, object]:
    """The document that `--json` prints."""
    manifest = exported.bundle.manifest
    return {
        "bundle": str(exported.bundle.path),
        "family": exported.family,
        "source": {"id": manifest.source.id, "revision": manifest.source.revision, "digest": manifest.source.digest},
        "graphs": {
            name: {
                "files": list(graph.files),
                "digest": graph.digest,
                "precision": graph.precision.value,
                "weights": graph.weights.value,
            }
            for name, graph in manifest.graphs.items()
        },
        "differences": [
            {"graph": d.graph, "output": d.output, "value": d.value, "unit": d.unit, "allowed": d.allowed}
            for d in exported.differences
        ],
        "unchecked": list(exported.unchecked),
        "unfused": list(exported.unfused),
        "seconds": round(seconds, 3),
    }


def plan_warnings(exported: Any) -> list[str]:
    """What keeps TensorRT from fusing the denoise step, one line each."""
    from oneword.export.inspection import inspect_graph

    bundle = exported.bundle
    return inspect_graph(bundle.file(bundle.graph("denoise_step").files[0])).warnings()


def parity_lines(exported: Any) -> list[str]:
    """How far the graphs differ from PyTorch, one line per output, under a heading; `finite` outputs are left out,
    because a bundle in which one differs is never written."""
    numbers = [difference for difference in exported.differences if difference.output != "finite"]
    heading = ["largest difference from PyTorch, by output:"] if numbers else []
    return [
        *heading,
        *(f"  {difference}" for difference in numbers),
        *(f"not checked: {reason}" for reason in exported.unchecked),
        *(f"without operators of ONNX Runtime's own: {reason}" for reason in exported.unfused),
    ]


def main() -> None:
    """The console script."""
    run_command(command, "ti-export")


if __name__ == "__main__":
    main()
