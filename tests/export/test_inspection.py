"""What TensorRT can fuse is found in graphs written by hand, and in those of exported models."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from oneword.export.inspection import CAST, LATE_SCALE, MASK, inspect_graph
from oneword.runtime.bundle import Bundle

FLOAT, HALF, INT = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64


def saved(folder: Path, text: str, *, dtype: int = HALF, opset: int = 20) -> Path:
    """A graph whose lines are `output = Operator input input`. Inputs are x, y, z [2, 4, 8, 8], q and k [2, 8, 8] and
    the constants scale, shape, ones and zeros; `-` is an input that is left out. The last line's output is the graph's.
    Several outputs are separated by commas, of which one may be left out too."""
    nodes = []
    for line in text.strip().splitlines():
        output, _, call = line.strip().partition(" = ")
        operator, *names = call.split()
        names = [name.strip("-") for name in names]
        kind, _, target = operator.partition(":")
        attributes = {"to": {"half": HALF, "float": FLOAT, "int": INT}[target]} if target else {}
        nodes.append(helper.make_node(kind, names, output.split(","), **attributes))
    shapes = {"x": [2, 4, 8, 8], "y": [2, 4, 8, 8], "z": [2, 4, 8, 8], "q": [2, 8, 8], "k": [2, 8, 8]}
    used = {name for node in nodes for name in node.input if name}
    inputs = [helper.make_tensor_value_info(n, dtype, s) for n, s in shapes.items() if n in used]
    array = np.float16 if dtype == HALF else np.float32
    constants = {
        "scale": np.array(0.125, array),
        "shape": np.array([2, 2, -1]),
        "ones": np.ones(2, array),
        "zeros": np.zeros(2, array),
    }
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items() if name in used]
    outputs = [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.UNDEFINED, None)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.save(model, folder / "step.onnx")
    return folder / "step.onnx"


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        ("a = Mul q scale\ns = MatMul a k\np = Softmax s\no = MatMul p q", []),
        ("a = MatMul q k\ns = Mul a scale\np = Softmax s\no = MatMul p q", [LATE_SCALE]),
        ("a = MatMul q k\ns = Add a q\np = Softmax s\no = MatMul p q", [MASK]),
        ("a = MatMul q k\nb = Mul a scale\ns = Add q b\np = Softmax s\no = MatMul p q", [LATE_SCALE, MASK]),
        ("a = MatMul q k\ns = Cast:float a\np = Softmax s\nc = Cast:half p\no = MatMul c q", [CAST]),
        ("a = MatMul q k\np = Softmax a\nc = Cast:float p\no = Relu c", [CAST]),
    ],
)
def test_what_is_between_the_product_of_attention_and_its_softmax_is_named(
    tmp_path: Path, text: str, reasons: list[str]
) -> None:
    inspection = inspect_graph(saved(tmp_path, text))

    assert inspection.attentions == 1
    assert inspection.unfused_attentions == Counter(reasons)
    assert inspection.warnings()[: len(reasons)] == [
        f"step may be slower in TensorRT: attentions with {reason}: 1 of 1" for reason in sorted(reasons)
    ]


def test_a_softmax_without_a_product_is_not_attention(tmp_path: Path) -> None:
    assert inspect_graph(saved(tmp_path, "a = Relu x\no = Softmax a")).attentions == 0


@pytest.mark.parametrize(("inputs", "reasons"), [("q k q", []), ("q k q q", [MASK])])
def test_the_operator_attention_is_fused_unless_it_has_a_mask(tmp_path: Path, inputs: str, reasons: list[str]) -> None:
    inspection = inspect_graph(saved(tmp_path, f"o = Attention {inputs}", opset=23))

    assert (inspection.attentions, inspection.unfused_attentions) == (1, Counter(reasons))


GROUP_NORM = """
a = Reshape x shape
{before}
n = InstanceNormalization {data} ones zeros
b = Shape x
{between}
r = Reshape {normed} b
m = Mul r scale
o = Add m scale
"""


@pytest.mark.parametrize(
    ("before", "data", "between", "normed", "split"),
    [
        ("", "a", "", "n", 0),
        ("c = Cast:float a", "c", "", "n", 1),
        ("", "a", "d = Cast:float n", "d", 1),
    ],
)
def test_a_conversion_within_a_group_norm_splits_it(
    tmp_path: Path, before: str, data: str, between: str, normed: str, split: int
) -> None:
    text = GROUP_NORM.format(before=before, data=data, between=between, normed=normed)
    lines = "\n".join(line for line in text.splitlines() if line)

    inspection = inspect_graph(saved(tmp_path, lines))

    assert (inspection.norms, inspection.split_norms) == (1, split)
    assert len(inspection.warnings()) == split


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("s = Sigmoid x\no = Mul x s", (1, 0)),
        ("f = Cast:float x\ns = Sigmoid f\nh = Cast:half s\no = Mul x h", (1, 1)),
        ("s = Sigmoid x\no = Mul y s", (0, 0)),  # a gate
    ],
)
def test_a_conversion_within_silu_splits_it(tmp_path: Path, text: str, counts: tuple[int, int]) -> None:
    inspection = inspect_graph(saved(tmp_path, text))

    assert (inspection.activations, inspection.split_activations) == counts


@pytest.mark.parametrize(
    ("text", "islands"),
    [
        ("a = Relu x\nf = Cast:float a\ng = Exp f\nh = Neg g\no = Cast:half h", 1),
        ("f = Cast:float x\ng = Exp f\nh = Cast:half g\ni = Relu h\nj = Cast:float i\nk2 = Neg j\no = Cast:half k2", 2),
        ("a = Relu x\nf = Cast:float a\no = Exp f", 0),  # its result is the graph's
        ("f = Cast:float x\no = Cast:half f", 0),  # nothing is computed
        (
            "f = Cast:float x\ng, = Dropout f\nh = Cast:half g\ni = Cast:float y\nj = Clip i - i\no = Cast:half j",
            2,  # an output and an input that are left out do not connect them
        ),
    ],
)
def test_a_part_in_float32_between_parts_in_half_precision_is_an_island(
    tmp_path: Path, text: str, islands: int
) -> None:
    assert inspect_graph(saved(tmp_path, text)).islands == islands


def test_a_graph_in_float32_has_no_islands(tmp_path: Path) -> None:
    assert inspect_graph(saved(tmp_path, "a = Relu x\no = Exp a", dtype=FLOAT)).islands == 0


@pytest.mark.parametrize(
    ("text", "shapes", "valued"),
    [
        ("a = Relu x\no = Reshape a shape", 0, 0),
        ("s = Shape x\nt = Neg s\nu = Neg t\no = Reshape y u", 3, 0),
        ("i = Cast:int x\no = Expand y i", 0, 1),
        ("d, = Dropout x\ns = Shape d\nt = Clip s - s\no = Reshape y t", 2, 0),
        ("o = NonZero x", 0, 1),
    ],
)
def test_shapes_that_follow_from_sizes_and_those_that_follow_from_values_are_counted(
    tmp_path: Path, text: str, shapes: int, valued: int
) -> None:
    inspection = inspect_graph(saved(tmp_path, text))

    assert (inspection.shape_nodes, inspection.value_shaped) == (shapes, valued)


def test_everything_in_the_step_of_an_exported_model_can_be_fused(tiny_bundle: Path, tiny_model_dir: Path) -> None:
    """The number of attentions, norms and activations is that of the modules of diffusers' UNet."""
    import torch
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention

    unet = UNet2DConditionModel.from_pretrained(tiny_model_dir / "unet")
    modules: list[Any] = list(unet.modules())
    bundle = Bundle.open(tiny_bundle)

    inspection = inspect_graph(bundle.file(bundle.graph("denoise_step").files[0]))

    assert inspection.warnings() == []
    assert inspection.value_shaped == 0
    assert inspection.attentions == sum(isinstance(module, Attention) for module in modules)
    norms = (torch.nn.GroupNorm, torch.nn.LayerNorm)
    assert inspection.norms == sum(isinstance(module, norms) for module in modules)


def test_the_step_of_an_exported_model_has_no_shape_arithmetic_left_at_a_fixed_size(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    """ONNX Runtime's basic optimisation folds what depends on sizes alone."""
    import onnxruntime as ort

    bundle = Bundle.open(tiny_bundle)
    graph = bundle.graph("denoise_step")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "fixed.onnx")
    sizes = {"B": 1, "N": 2, "M": 2, "T": 20, "h": 8, "w": 8}
    assert {axis for spec in graph.inputs for axis in spec.axes if isinstance(axis, str)} == sizes.keys()
    for axis, size in sizes.items():
        options.add_free_dimension_override_by_name(axis, size)

    ort.InferenceSession(bundle.file(graph.files[0]), options, providers=["CPUExecutionProvider"])

    assert inspect_graph(bundle.file(graph.files[0])).shape_nodes > 0
    assert inspect_graph(tmp_path / "fixed.onnx").shape_nodes == 0
