"""Lowers a captured program to operators that torch.onnx converts well.

torch.onnx calls `run_decompositions` for this, which traces the whole program again and takes longer than capturing it.
Of the operators that the families use it replaces only a few; `lower` replaces them in place. A program with an
operator that is in neither CONVERTED nor REPLACED is left to `run_decompositions`. torch.onnx then looks for operands
of different types; `known_values` keeps it from running the program a third time for this.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

aten: Any = torch.ops.aten

_NAMES = """
_to_copy.default abs.default add.Scalar add.Tensor all.dim amax.default amin.default arange.default arange.start
arange.start_step argmax.default bitwise_and.Tensor bmm.default cat.default clamp.Tensor clamp.default clamp_min.default
clone.default concat.default conv2d.default cos.default cumsum.default div.Scalar div.Tensor einsum.default
embedding.default eq.Scalar eq.Tensor exp.default expand.default full.default full_like.default gather.default ge.Scalar
ge.Tensor gelu.default group_norm.default gt.Scalar gt.Tensor index.Tensor index_select.default isfinite.default
layer_norm.default le.Scalar le.Tensor linear.default log.default logical_and.default logical_not.default lt.Scalar
lt.Tensor masked_fill.Scalar matmul.default maximum.default mean.dim minimum.default mul.Scalar mul.Tensor ne.Scalar
ne.Tensor neg.default new_ones.default new_zeros.default ones.default ones_like.default pad.default permute.default
pixel_shuffle.default pixel_unshuffle.default pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor reciprocal.default
relu.default repeat.default reshape.default round.default rsqrt.default scalar_tensor.default
scaled_dot_product_attention.default select.int sigmoid.default silu.default sin.default slice.Tensor softmax.int
split.Tensor split_with_sizes.default sqrt.default squeeze.dim stack.default sub.Scalar sub.Tensor sum.dim_IntList
sym_size.int tanh.default transpose.int triu.default unbind.int unsqueeze.default upsample_nearest2d.vec
where.ScalarOther where.ScalarSelf where.self zeros.default zeros_like.default
"""
CONVERTED = frozenset(f"aten.{name}" for name in _NAMES.split())
"""Operators that torch.onnx converts as they are."""
REPLACED = {
    aten._assert_tensor_metadata.default,
    aten.__and__.Tensor,
    aten.chunk.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.dropout.default,
    aten.flatten.using_ints,
    aten.rms_norm.default,
    aten.rsub.Scalar,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.unflatten.int,
    aten.view.default,
}


def lower(program: ExportedProgram) -> bool:
    """Lowers a program in place, so that torch.onnx.export does not trace it again. Returns False if it has an operator
    that is not listed here; torch.onnx.export then traces it as before."""
    if not CONVERTED.issuperset(map(str, operators(program) - REPLACED)):
        return False
    symbols: dict[str, Node] = {}
    for node in list(program.graph.nodes):
        if isinstance(node.meta.get("val"), torch.SymInt):
            symbols.setdefault(str(node.meta["val"]), node)
        elif node.op == "call_function":
            _replace(node, symbols)
    program.graph.eliminate_dead_code()
    outputs: Any = program.graph.output_node().args[0]
    for spec, node in zip(program.graph_signature.output_specs, outputs, strict=True):
        spec.arg.name = node.name
    program.graph_module.recompile()
    lowered = CONVERTED.issuperset(map(str, operators(program)))
    if lowered:
        program.run_decompositions = lambda *_: program
    return lowered


@contextlib.contextmanager
def known_values() -> Iterator[None]:
    """A context in which torch.onnx's type promotion takes the values that a program's nodes have, and runs only the
    operators that it changes. Has no effect if another version of PyTorch promotes types in another way."""
    try:
        from torch.onnx._internal.fx.passes import type_promotion

        interpreter: Any = type_promotion._TypePromotionInterpreter
        rule_of = type_promotion.get_type_promotion_rule
    except (ImportError, AttributeError):
        yield
        return
    original = interpreter.run_node

    def run_node(self: Any, node: Node) -> Any:
        with self._set_current_node(node):
            if rule := rule_of(node, self.type_promotion_table):
                self._maybe_promote_node(node, rule)
        known = node.op == "call_function" and "val" in node.meta
        return node.meta["val"] if known else super(interpreter, self).run_node(node)

    interpreter.run_node = run_node
    try:
        yield
    finally:
        interpreter.run_node = original


def operators(program: ExportedProgram) -> set[Any]:
    """The operators of a program, also those that hold programs, such as `cond`."""
    return {node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OperatorBase)}


def _replace(node: Any, symbols: dict[str, Node]) -> None:
    """Replaces one operator, or removes it if it changes nothing. `symbols`: the program's sizes by expression."""
    match node.target:
        case aten._assert_tensor_metadata.default:
            node.graph.erase_node(node)
        case aten.contiguous.default | aten.detach.default:
            _remove(node)
        case aten.dropout.default if not node.args[2]:
            _remove(node)
        case aten.to.dtype | aten.to.dtype_layout:
            dtype = node.meta["val"].dtype
            if dtype == node.args[0].meta["val"].dtype:
                _remove(node)
            else:
                _become(node, aten._to_copy.default, node.args[:1], dtype=dtype)
        case aten.flatten.using_ints | aten.reshape.default | aten.unflatten.int:
            if sizes := _sizes(node, symbols):
                _become(node, aten.reshape.default, (node.args[0], sizes))
        case aten.view.default:  # its input may not be contiguous any more
            _become(node, aten.reshape.default, (node.args[0], _sizes(node, symbols) or node.args[1]))
        case aten.chunk.default:
            source, _, axis = (*node.args, 0)[:3]
            if isinstance(size := node.meta["val"][0].shape[axis], int):
                _become(node, aten.split.Tensor, (source, size, axis))
        case aten.rms_norm.default:
            _replace_rms_norm(node)
        case aten.rsub.Scalar if len(node.args) == 2:
            _become(node, aten.sub.Tensor, node.args[::-1])
        case aten.__and__.Tensor:
            _become(node, aten.bitwise_and.Tensor, node.args)


def _replace_rms_norm(node: Any) -> None:
    """As PyTorch computes it: in float32 if the input is less precise."""
    x, normalized, weight, eps = (*node.args, None, None)[:4]
    dtype = node.meta["val"].dtype
    with node.graph.inserting_before(node):
        if dtype in (torch.float16, torch.bfloat16):
            x = _insert(node, aten._to_copy.default, x, dtype=torch.float32)
        eps = torch.finfo(x.meta["val"].dtype).eps if eps is None else eps
        axes = list(range(-len(normalized), 0))
        mean = _insert(node, aten.mean.dim, _insert(node, aten.pow.Tensor_Scalar, x, 2), axes, True)
        scale = _insert(node, aten.rsqrt.default, _insert(node, aten.add.Scalar, mean, eps))
        x = _insert(node, aten.mul.Tensor, x, scale)
        if weight is not None:
            x = _insert(node, aten.mul.Tensor, x, weight)
        if x.meta["val"].dtype != dtype:
            x = _insert(node, aten._to_copy.default, x, dtype=dtype)
    node.replace_all_uses_with(x)
    node.graph.erase_node(node)


def _insert(node: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
    """A new node before `node`, with its value computed from those of its inputs."""
    new = node.graph.call_function(target, args, kwargs)
    new.meta = {**node.meta, "val": target(*(a.meta["val"] if isinstance(a, Node) else a for a in args), **kwargs)}
    return new


def _become(node: Node, target: Any, args: tuple[Any, ...], **kwargs: Any) -> None:
    """Replaces the operator of a node, whose value remains the same."""
    node.target, node.args, node.kwargs = target, args, kwargs


def _remove(node: Any) -> None:
    """Replaces a node by its first input."""
    node.replace_all_uses_with(node.args[0])
    node.graph.erase_node(node)


def _sizes(node: Any, symbols: dict[str, Node]) -> list[int | Node] | None:
    """The sizes of a node's value, at most one of them -1; None if several have no node in the program."""
    shape = node.meta["val"].shape
    if sum(not isinstance(size, int) for size in shape) == 1:
        return [size if isinstance(size, int) else -1 for size in shape]
    source = node.args[0]
    for axis, size in enumerate(source.meta["val"].shape):
        if not isinstance(size, int) and str(size) not in symbols and str(size) in map(str, shape):
            with node.graph.inserting_before(node):
                symbols[str(size)] = _insert(node, aten.sym_size.int, source, axis)
    sizes = [size if isinstance(size, int) else symbols.get(str(size), -1) for size in shape]
    return sizes if sizes.count(-1) <= 1 else None
