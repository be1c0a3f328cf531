"""The description of a graph: files, precision, and the name, dtype and axes of every input and output. No data."""

import hashlib
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypeAlias

import msgspec

from oneword.engines.files import file_digest


class Precision(StrEnum):
    """The number format a graph computes in; its inputs and outputs are float32 unless its specs say otherwise."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


class Weights(StrEnum):
    """How a graph's weights are stored. The graph computes in its precision either way."""

    FLOAT = "float"  # in the graph's precision
    INT8 = "int8"  # those of convolutions and matrix products as integers, with one scale per output channel


class Provider(StrEnum):
    """An execution provider of ONNX Runtime."""

    CPU = "cpu"
    CUDA = "cuda"


class DType(StrEnum):
    """Element type of a graph's input or output, by numpy's name."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    INT64 = "int64"
    UINT8 = "uint8"
    BOOL = "bool"


Size: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
"""Of a fixed axis."""


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One input or output of a graph.

    `axes` holds a name for every dynamic axis and a number for every fixed one: `("B", 8, "h", "w")`. Equal names
    mean equal sizes throughout the graph. An `optional` input may be omitted; zeros are fed instead.
    """

    name: str
    dtype: DType
    axes: tuple[str | Size, ...]
    optional: bool = False

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}[{', '.join(str(axis) for axis in self.axes)}]"


class Graph(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One graph on disk. `files[0]` is the .onnx, the rest its external data; `digest` covers them all.

    `fused` names copies of the .onnx that use ONNX Runtime's own operators and the same external data.
    """

    files: tuple[str, ...]
    digest: str
    precision: Precision
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    fused: dict[Provider, str] = {}
    weights: Weights = Weights.FLOAT

    @property
    def all_files(self) -> tuple[str, ...]:
        """The graph's files and those of its copies."""
        return (*self.files, *dict.fromkeys(self.fused.values()))

    def onnx_for(self, provider: Provider) -> str:
        """The .onnx file that ONNX Runtime opens with this provider."""
        return self.fused.get(provider, self.files[0])


def graph_digest(folder: Path, files: Iterable[str]) -> str:
    """sha256 over the sha256 of each file, in order: the .onnx and its external data."""
    return digest_of(file_digest(folder / name) for name in files)


def digest_of(file_digests: Iterable[str]) -> str:
    """A graph's digest, from those of its files in order."""
    return hashlib.sha256("".join(file_digests).encode()).hexdigest()
