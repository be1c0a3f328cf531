"""What keeps TensorRT from fusing an exported graph, found in its nodes. Weights are not read and nothing is changed.

TensorRT recognises patterns: attention whose scores go from their product straight into the softmax, and norms and
activations with no conversion between their nodes. Not covered: which kernels it then chooses, which only it knows.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import onnx
from onnx import NodeProto, TensorProto

_HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_SHAPE_OPERANDS = {
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "OneHot": (1,),
    "Pad": (1,),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (2, 3),
    "Slice": (1, 2, 4),
    "Split": (1,),
    "Tile": (1,),
    "TopK": (1,),
}
"""Inputs whose values, not only their shapes, decide the shape of the output."""
_VALUE_SHAPED = {"Compress", "If", "Loop", "NonMaxSuppression", "NonZero", "Scan", "Unique"}
"""Operators whose output's shape depends on the values of their data."""
_NORMS = {"GroupNormalization", "InstanceNormalization", "LayerNormalization", "RMSNormalization"}
_BETWEEN = {"Add", "Cast", "Clip", "Div", "Max", "Min", "Mul", "Sub", "Where"}
"""What may be between the product of attention and its softmax."""
_REACH = 8  # nodes between them
LATE_SCALE, MASK, CAST = "a scale after the product", "a mask before the softmax", "a conversion around the softmax"


@dataclass(frozen=True)
class Inspection:
    """Counts of one graph."""

    graph: str
    attentions: int
    unfused_attentions: Counter[str]
    """What stands in the way, with the number of attentions that have it."""
    norms: int
    split_norms: int
    """Group norms with a conversion between their nodes."""
    activations: int
    split_activations: int
    """SiLU with a conversion between its sigmoid and its product."""
    islands: int
    """Parts that compute in float32 between two that compute in half precision."""
    shape_nodes: int
    """Nodes that compute shapes. A plan for one size has none of them left."""
    value_shaped: int
    """Nodes whose output's shape depends on values. They are left in every plan."""

    def warnings(self) -> list[str]:
        """One line for everything that makes TensorRT slower."""
        attentions = [
            f"attentions with {reason}: {count} of {self.attentions}"
            for reason, count in self.unfused_attentions.items()
        ]
        counts = {
            f"norms split by a conversion: {self.split_norms} of {self.norms}": self.split_norms,
            f"SiLU split by a conversion: {self.split_activations} of {self.activations}": self.split_activations,
            f"parts in float32 between parts in half precision: {self.islands}": self.islands,
            f"nodes with a shape that depends on values: {self.value_shaped}": self.value_shaped,
        }
        lines = [*attentions, *(line for line, count in counts.items() if count)]
        return [f"{self.graph} may be slower in TensorRT: {line}" for line in lines]


def inspect_graph(path: Path) -> Inspection:
    """Inspects an ONNX file, whose external data need not exist."""
    graph = _Graph(onnx.load(path, load_external_data=False))
    attentions = [*graph.attentions()]
    norms = [node for node in graph.nodes if node.op_type in _NORMS]
    activations = [*graph.activations()]
    return Inspection(
        graph=path.stem,
        attentions=len(attentions),
        unfused_attentions=Counter(reason for reasons in attentions for reason in sorted(reasons)),
        norms=len(norms),
        split_norms=sum(graph.is_split_norm(node) for node in norms),
        activations=len(activations),
        split_activations=sum(activations),
        islands=len(graph.islands()),
        shape_nodes=sum(node.op_type == "Shape" for node in graph.nodes) + len(graph.shape_arithmetic()),
        value_shaped=len(graph.value_shaped()),
    )


class _Graph:
    """A graph's nodes, with who computes and who uses each value. An optional input or output that a node does without
    has no name, and is no value."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        self.constants = {tensor.name for tensor in model.graph.initializer}
        self.constants |= {name for node in self.nodes if node.op_type == "Constant" for name in node.output}
        self._producer = {name: node for node in self.nodes for name in node.output if name}
        self._users: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in filter(None, node.input):
                self._users[name].append(node)

    def users(self, node: NodeProto) -> list[NodeProto]:
        """The nodes that use an output of this one."""
        return [user for name in node.output for user in self._users.get(name, ())]

    def producers(self, node: NodeProto) -> list[NodeProto]:
        """The nodes that compute an input of this one."""
        return [self._producer[name] for name in node.input if name in self._producer]

    def attentions(self) -> Iterator[set[str]]:
        """What stands in the way of each attention: nothing, in the form that TensorRT fuses."""
        for node in self.nodes:
            if node.op_type == "Attention":
                yield {MASK} if len(node.input) > 3 and node.input[3] else set()
            elif node.op_type == "Softmax" and (reasons := self._to_product(node.input[0], _REACH)) is not None:
                yield reasons | ({CAST} if any(user.op_type == "Cast" for user in self.users(node)) else set())

    def _to_product(self, name: str, reach: int) -> set[str] | None:
        """What is between this value and the product it comes from; None if it comes from none."""
        node = self._producer.get(name)
        if node is None or not reach:
            return None
        if node.op_type in ("MatMul", "Gemm", "Einsum"):
            return set()
        if node.op_type not in _BETWEEN:
            return None
        for operand in node.input:
            if operand not in self.constants and (reasons := self._to_product(operand, reach - 1)) is not None:
                if node.op_type == "Cast":
                    return reasons | {CAST}
                scales = node.op_type in ("Mul", "Div") and any(o in self.constants for o in node.input)
                return reasons | {LATE_SCALE if scales else MASK}
        return None

    def is_split_norm(self, node: NodeProto) -> bool:
        """Whether a conversion is between a group norm's nodes: a reshape, a norm, a reshape, a product and a sum."""
        if node.op_type != "InstanceNormalization":
            return False
        parts, before = [node], self._producer.get(node.input[0])
        for _ in range(3):
            parts = [user for part in parts for user in self.users(part)]
            if any(part.op_type == "Cast" for part in parts):
                return True
            parts = [part for part in parts if part.op_type in ("Reshape", "Mul", "Add")]
        while before is not None and before.op_type == "Reshape":
            before = self._producer.get(before.input[0])
        return before is not None and before.op_type == "Cast"

    def activations(self) -> Iterator[bool]:
        """Whether each SiLU, x sigmoid(x), is split by a conversion."""
        for node in self.nodes:
            if node.op_type != "Sigmoid":
                continue
            if any(user.op_type == "Mul" and node.input[0] in user.input for user in self.users(node)):
                yield False
            elif any(other.op_type == "Cast" for other in (*self.users(node), *self.producers(node))):
                yield True

    def islands(self) -> list[set[int]]:
        """The connected parts, as indices of nodes, that compute in float32 from and for half precision."""
        types = self._types
        if not any(kind in _HALF for kind in types.values()):
            return []
        wide = {
            i
            for i, node in enumerate(self.nodes)
            if node.op_type != "Cast" and any(types.get(name) == TensorProto.FLOAT for name in node.output)
        }
        half = {name for name, kind in types.items() if kind in _HALF}
        casts = [(i, *node.input, *node.output) for i, node in enumerate(self.nodes) if node.op_type == "Cast"]
        widened = [i for i, source, target in casts if source in half and target not in half]
        narrowed = [i for i, source, target in casts if target in half and source not in half]
        index = {id(node): i for i, node in enumerate(self.nodes)}
        after = [[index[id(user)] for user in self.users(node)] for node in self.nodes]
        before = [[index[id(producer)] for producer in self.producers(node)] for node in self.nodes]
        inside = _reached(widened, after, wide) & _reached(narrowed, before, wide)
        neighbours = [[*users, *producers] for users, producers in zip(after, before, strict=True)]
        parts: list[set[int]] = []
        seen: set[int] = set()
        for node in sorted(inside):
            if node not in seen:
                parts.append(_reached([node], neighbours, inside) | {node})
                seen |= parts[-1]
        return parts

    @cached_property
    def _types(self) -> dict[str, int]:
        """The element type of every value that ONNX infers."""
        graph = onnx.shape_inference.infer_shapes(self.model).graph
        values = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
        return {**values, **{tensor.name: tensor.data_type for tensor in graph.initializer}}

    def shape_arithmetic(self) -> list[NodeProto]:
        """The nodes that compute with shapes alone."""
        return [
            node
            for node in self.nodes
            if node.op_type not in ("Shape", "Constant")
            and not self._depends_on_values(node.input)
            and not all(name in self.constants for name in node.input if name)
        ]

    def value_shaped(self) -> list[NodeProto]:
        """The nodes whose output's shape depends on the values of an input of the graph."""
        return [
            node
            for node in self.nodes
            if node.op_type in _VALUE_SHAPED
            or self._depends_on_values(
                node.input[i] for i in _SHAPE_OPERANDS.get(node.op_type, ()) if i < len(node.input)
            )
        ]

    def _depends_on_values(self, names: Iterable[str]) -> bool:
        return any(name in self._valued for name in names)

    @cached_property
    def _valued(self) -> set[str]:
        """The values that depend on those of the graph's inputs, and not on their shapes alone."""
        valued = {value.name for value in self.model.graph.input} - self.constants
        for node in self.nodes:  # ONNX lists a node after those it uses
            if node.op_type not in ("Shape", "Size") and any(name in valued for name in node.input):
                valued.update(filter(None, node.output))
        return valued


def _reached(starts: Iterable[int], edges: list[list[int]], allowed: set[int]) -> set[int]:
    """The allowed nodes that can be reached from others over these edges, through allowed ones only."""
    found: set[int] = set()
    queue = [node for start in starts for node in edges[start]]
    while queue:
        node = queue.pop()
        if node in allowed and node not in found:
            found.add(node)
            queue += edges[node]
    return found
