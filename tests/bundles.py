"""Bundles for tests: exported once, then copied from `.cache/bundles`, keyed by everything the export depends on.

Exports of code that was not used for a week are deleted. Graphs that models share are traced once, and compared with
the module of every model. `python -m tests.bundles` is `ti-export` with such graphs, for models of less than 2 GB.
"""

import hashlib
import io
import os
import pickle
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any, TypeVar
from unittest.mock import patch

import onnx_ir
import torch
from diffusers.configuration_utils import FrozenDict
from filelock import FileLock
from torch.onnx._internal.exporter._registration import ONNXRegistry

import oneword
from oneword.engines.graph import Provider, Weights
from oneword.export import write
from oneword.export.families import Traceable
from oneword.export.source import find_model
from oneword.export.trace import converted, trace
from oneword.export.write import Exported, export_bundle
from oneword.runtime.bundle import Bundle

T = TypeVar("T")
CACHE = Path(__file__).parents[1] / ".cache" / "bundles"
PACKAGES = (
    *("torch", "diffusers", "transformers", "tokenizers", "safetensors", "peft", "accelerate", "numpy"),
    *("onnx", "onnx-ir", "onnxscript", "onnxruntime"),
)
OPTIONS = ("precision", "preview", "weights", "without")
MOST_CODES, MOST_DAYS = 8, 7
"""The exports of so many versions of the code are kept, each for so many days after it was last used."""
CONVERSIONS = staticmethod(cache(ONNXRegistry.from_torchlib))
"""torch.onnx's conversions by opset, which it would read from their sources again for every graph."""


def export_once(model: str | Path, bundle: Path, **options: Any) -> Exported:
    """What `export_bundle` returns for a model and those of its options that are in OPTIONS, written to `bundle`.

    An export that was made before, of the same files by the same code, is copied. Processes take turns, so that one
    exports and the others copy.
    """

    def export(folder: Path) -> Exported:
        with suppress(FileNotFoundError):  # another process deletes them
            drop_unused(CACHE)
        with traced_once():
            return replace(export_bundle(model, folder, **options), bundle=None)

    exported, files = made_once(key(model, options), export)
    shutil.copytree(files, bundle)
    return replace(exported, bundle=Bundle.open(bundle))


def made_once(name: str, make: Callable[[Path], T]) -> tuple[T, Path]:
    """What `make` returned when this code first called it for `name`, and the folder that it wrote."""
    stored = CACHE / code_digest() / name
    stored.parent.mkdir(parents=True, exist_ok=True)
    os.utime(stored.parent)
    with FileLock(stored.with_suffix(".lock")):
        if not stored.exists():
            with tempfile.TemporaryDirectory(dir=stored.parent) as work:
                whole = Path(work, "whole")
                whole.mkdir()
                (whole / "result.pickle").write_bytes(pickle.dumps(make(whole / "files")))
                whole.rename(stored)
    return pickle.loads((stored / "result.pickle").read_bytes()), stored / "files"


def drop_unused(cache: Path) -> None:
    """Deletes what `cache` has more or longer than MOST_CODES and MOST_DAYS allow."""
    folders = sorted(cache.iterdir(), key=lambda folder: folder.stat().st_mtime, reverse=True)
    for place, folder in enumerate(folders):
        if place >= MOST_CODES or time.time() - folder.stat().st_mtime > MOST_DAYS * 86_400:
            shutil.rmtree(folder, ignore_errors=True)


def traced_once() -> Any:
    """A context in which `export_bundle` traces a graph only if no equal one was traced before."""
    return patch.object(write, "trace", trace_once)


def trace_once(
    graph: Traceable, folder: Path, weights: Weights = Weights.FLOAT
) -> tuple[tuple[str, ...], dict[Provider, str]]:
    """As `trace`; the files of a graph that equals one that was traced before are copied."""

    def traced(files: Path) -> tuple[tuple[str, ...], dict[Provider, str]]:
        files.mkdir()
        with patch.object(oneword.export.trace, "converted", converted_once):
            return trace(graph, files, weights)

    made, files = made_once(f"graph-{graph_key(graph, weights)}", traced)
    shutil.copytree(files, folder, dirs_exist_ok=True)
    return made


def converted_once(graph: Traceable) -> onnx_ir.Model:
    """As `converted`; the models of one graph with weights in different formats are read from one file."""

    def convert(files: Path) -> None:
        files.mkdir()
        with patch.object(ONNXRegistry, "from_torchlib", CONVERSIONS):
            onnx_ir.save(converted(graph), files / "model.onnx")

    _, files = made_once(f"converted-{graph_key(graph)}", convert)
    return onnx_ir.load(files / "model.onnx")


def graph_key(graph: Traceable, weights: Weights | None = None) -> str:
    """A digest of all that a trace depends on: the module with its settings and weights, inputs, outputs and limits."""
    content = io.BytesIO()
    parts = (graph.name, graph.module, graph.inputs, graph.outputs, dict(graph.limits), weights)
    _GraphPickler(content).dump(parts)
    return hashlib.sha256(content.getvalue()).hexdigest()[:16]


class _GraphPickler(pickle.Pickler):
    """Equal bytes for equal graphs: no paths, whose folders are temporary, and no order of sets."""

    def persistent_id(self, value: Any) -> bytes | None:
        match value:
            case torch.Tensor():
                numbers = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
                return f"{value.dtype} {tuple(value.shape)} ".encode() + hashlib.sha256(numbers.tobytes()).digest()
            case str():
                return b"a path" if value != "/" and Path(value).is_absolute() else b"a string: " + value.encode()
            case PurePath():
                return b"a path"
            case set() | frozenset():
                return repr(sorted(map(repr, value))).encode()
            case FrozenDict():  # a diffusers configuration; its own entries have a path and a list of unsorted names
                return repr(sorted((k, v) for k, v in value.items() if not k.startswith("_"))).encode()
        return None


def key(model: str | Path, options: Mapping[str, Any]) -> str:
    """A digest of a model's name and files, and of the options: their values, and the files of those that are folders.

    Raises TypeError for an option that is not in OPTIONS.
    """
    if unknown := options.keys() - set(OPTIONS):
        raise TypeError(f"options {sorted(unknown)} are not in the cache's key: use export_bundle")
    digest = hashlib.sha256(Path(model).name.encode())
    for name, value in sorted({"model": find_model(str(model))[0], **options}.items()):
        files = _files(value) if isinstance(value, Path) else [(name, str(value).encode())]
        for part, content in files:
            digest.update(f"{name} {part} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


@cache
def code_digest() -> str:
    """A digest of the code that exports, and of the versions of Python and of the packages that it uses."""
    versions = [sys.version, *(version(package) for package in PACKAGES)]
    digest = hashlib.sha256(repr(versions).encode())
    for layer in ("engines", "runtime", "export"):
        for part, content in _files(Path(oneword.__file__).parent / layer, "*.py"):
            digest.update(f"{layer} {part} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def _files(folder: Path, pattern: str = "*") -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.resolve().rglob(pattern)):
        if path.is_file():
            yield str(path.relative_to(folder.resolve())), path.read_bytes()


if __name__ == "__main__":
    from oneword.export.cli import main

    with traced_once():
        main()
