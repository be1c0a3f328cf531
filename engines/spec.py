"""What a tensor of a graph looks like: name, dtype, named axes, and whom it belongs to. No data."""

from enum import StrEnum

import msgspec


class Precision(StrEnum):
    """The number format a graph computes in; its inputs and outputs are float32 unless its specs say otherwise."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


class DType(StrEnum):
    """Element type of a graph's input or output, by numpy's (and ml_dtypes') name."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    INT64 = "int64"
    UINT8 = "uint8"
    BOOL = "bool"

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return _ITEMSIZE[self]


_ITEMSIZE = {
    DType.FLOAT32: 4,
    DType.FLOAT16: 2,
    DType.BFLOAT16: 2,
    DType.INT64: 8,
    DType.UINT8: 1,
    DType.BOOL: 1,
}


class Owner(StrEnum):
    """What one slice along the first axis of a tensor belongs to."""

    ROW = "row"  # a picture
    BRANCH = "branch"  # a UNet evaluation
    CONTEXT = "context"  # an encoded prompt
    MODEL = "model"  # shared by all, such as the embedding table


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One input or output of a graph.

    `axes` holds a name for every dynamic axis and a number for every fixed one: `("B", 8, "h", "w")`. Equal names
    are equal sizes throughout the graph. An `optional` input may be left out; zeros are then fed.
    """

    name: str
    dtype: DType
    axes: tuple[str | int, ...]
    owner: Owner = Owner.ROW
    optional: bool = False

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}[{', '.join(str(axis) for axis in self.axes)}]"
