"""Writes a source as a bundle: graphs, traced and checked one after another, with tables and tokenizers."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from safetensors.torch import save_file

from oneword.engines.errors import EngineError, UsageError, one_line
from oneword.engines.graph import Graph, Precision, Provider, Weights, graph_digest
from oneword.engines.onnxruntime import OnnxRuntimeEngine, load_onnxruntime
from oneword.export.families import TORCH_DTYPES, Exportable, Traceable, family_of, with_preview_decoder
from oneword.export.loras import Lora
from oneword.export.parity import Difference, Reference, compare, compare_fused, references
from oneword.export.preview import preview_of
from oneword.export.source import Source, load_preview_decoder, load_source
from oneword.export.trace import trace
from oneword.runtime.bundle import TOKENIZER, Bundle, Manifest, Provenance, check_target, write_bundle
from oneword.runtime.samplers import sampler_of

Report = Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """A bundle, and how far its graphs differ from the torch modules."""

    bundle: Bundle
    family: str
    differences: tuple[Difference, ...]
    unchecked: tuple[str, ...]
    """Graphs that the checking engine cannot run, each with the reason."""
    unfused: tuple[str, ...] = ()
    """Graphs whose fused copies were left out, each with the reason."""
    warnings: tuple[str, ...] = ()
    """What is different in the bundle from the model, one line each."""


def export_bundle(
    model: str | Path,
    path: str | Path,
    *,
    precision: Precision = Precision.FP32,
    weights: Weights = Weights.FLOAT,
    config: Path | None = None,
    loras: Sequence[Lora] = (),
    without: Sequence[str] = (),
    preview: Path | None = None,
    report: Report = lambda message: None,
    accept: Callable[[Exportable], None] = lambda exportable: None,
) -> Exported:
    """Exports `model` (see load_source) to a bundle at `path`, which appears only when complete. `preview` is a
    diffusers directory of an AutoencoderTiny, which becomes the bundle's preview decoder. `report` is called at every
    stage; `accept` may raise, after the model is loaded and before the long work."""
    if weights is Weights.INT8 and precision is not Precision.FP32:
        raise UsageError(f"--weights int8 with --precision {precision}: int8 weights are for --precision fp32 only")
    check_target(path)
    if precision is not Precision.BF16:  # else no graph is run
        load_onnxruntime()
    report(f"loading {model}")
    tiny = None if preview is None else load_preview_decoder(preview, TORCH_DTYPES[precision])
    source = load_source(model, TORCH_DTYPES[precision], config=config, loras=loras, without=without)
    exportable = family_of(source)
    if tiny is not None and preview is not None:
        exportable = with_preview_decoder(exportable, tiny, preview)
    accept(exportable)
    origin = Provenance(id=source.name, digest=source.digest, revision=source.revision or None)
    warnings: list[str] = []
    if sampler_of(source.scheduler_config) is None:
        scheduler = source.scheduler_config.get("_class_name")
        warnings.append(
            f"{scheduler} has no counterpart here: {exportable.defaults.sampler} is the bundle's default sampler"
        )
    differences: list[Difference] = []
    unchecked: list[str] = []
    unfused: list[str] = []

    def fill(folder: Path) -> Manifest:
        graphs = {}
        for graph in exportable.graphs:
            report(f"running {graph.name} in PyTorch")
            cases = references(graph)  # in bf16 too, although nothing is compared: its outputs must be finite
            report(f"tracing {graph.name}")
            graphs[graph.name] = write_graph(graph, folder, weights)
            if graph.name == "denoise_step":
                source.network.to("meta")  # its weights, because the check needs as much memory for the graph's
            gc.collect()  # the traced model too, which refers to itself and to the weights
            report(f"checking {graph.name}")
            if graph.precision is Precision.BF16:
                unchecked.append(f"{graph.name}: ONNX Runtime does not compute in bf16 on a CPU")
            else:
                checked = check_graph(graph, graphs[graph.name], folder, cases)
                graphs[graph.name] = checked.graph
                differences.extend(checked.differences)
                unfused.extend(checked.unfused)
        report("writing tables and tokenizers")
        write_encoders(source, exportable, folder)
        return exportable.manifest(graphs, origin, preview_of(source))

    bundle = write_bundle(path, fill)
    return Exported(bundle, exportable.family, tuple(differences), tuple(unchecked), tuple(unfused), tuple(warnings))


def write_graph(graph: Traceable, folder: Path, weights: Weights = Weights.FLOAT) -> Graph:
    """Traces one graph into `folder` and describes it."""
    files, fused = trace(graph, folder, weights)
    return Graph(
        files=files,
        digest=graph_digest(folder, files),
        precision=graph.precision,
        inputs=graph.inputs,
        outputs=graph.outputs,
        fused=fused,
        weights=weights,
    )


class Checked(NamedTuple):
    """A graph that was compared with its module, with the fused copies that it has then."""

    graph: Graph
    differences: list[Difference]
    unfused: tuple[str, ...] = ()
    """Why its copies were deleted, if they were."""


def check_graph(graph: Traceable, written: Graph, folder: Path, cases: Sequence[Reference]) -> Checked:
    """Compares a graph written into `folder`, run in ONNX Runtime, with its module's outputs, and its fused copy for
    the CPU with it. If the copy differs or does not run, the graph's copies are deleted.

    The copy for CUDA is not run: it differs from the one for the CPU by BiasSplitGelu alone. Raises EngineError.
    """
    bare = msgspec.structs.replace(written, fused={})
    original = OnnxRuntimeEngine(graph.name, bare, folder)
    differences = compare(original, cases, graph.precision, written.weights)
    if Provider.CPU not in written.fused:
        return Checked(written, differences)
    cases = [Reference(case.feeds, original.run(case.feeds)) for case in cases]
    del original  # a large graph's weights fit into memory once
    try:
        compare_fused(OnnxRuntimeEngine(graph.name, written, folder), cases, graph.precision)
    except EngineError as error:
        for name in written.fused.values():
            (folder / name).unlink()
        return Checked(bare, differences, (one_line(error),))
    return Checked(written, differences)


def write_encoders(source: Source, exportable: Exportable, folder: Path) -> None:
    """Writes every encoder's base table and its tokenizer."""
    for encoder in exportable.encoders:
        table = exportable.tables[encoder.graph].contiguous().clone()
        save_file({"embedding_table": table}, folder / encoder.table)
        write_tokenizer(source.tokenizers[encoder.graph], folder / encoder.tokenizer)


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes tokenizer.json, which the `tokenizers` library reads."""
    folder.mkdir()
    tokenizer.backend_tokenizer.save(str(folder / TOKENIZER))
