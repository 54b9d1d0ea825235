"""Decompose an operator into simpler ones, as torch defines it, where no rule can split it.

Composite operators (`cosine_similarity`, `kron`) run on fake tensors while the operators they call are recorded. For
others (`softmax`, `tril`) torch has a table of decompositions.
"""

from __future__ import annotations

import operator
from functools import lru_cache
from math import isqrt, prod
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import decomposition_table
from torch._ops import OpOverload
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _pytree as pytree

from ..capture.kinds import is_composite, mutates
from ..ir.operators import spec_of
from ..ir.program import calls, shape_of
from .builder import Builder
from .cost import flops
from .normalize import rewrite


def decompose(node: fx.Node) -> fx.Graph | None:
    """The decomposition of `node` in normal form: a graph whose placeholders are its tensor operands, in order.

    None where torch has no decomposition, or one that reads values.
    """
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    values = [_Operand(leaf.meta["val"]) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
    return _traced(node.target, tuple((type(v), v) for v in values), spec)


def count_work(graph: fx.Graph) -> None:
    """Set `meta["flops"]` of operators that have neither a rule nor a FLOP formula to the FLOPs of their decomposition.

    Without a decomposition the work is unknown: the FLOPs are `product_flops`, and `meta["estimated"]` is true. An
    operator with a rule but no formula is bound by memory.
    """
    for node in calls(graph):
        spec = spec_of(node.target)
        if spec.rule is None and spec.flops is None and node.target is not operator.getitem and node.all_input_nodes:
            parts = decompose(node)
            if parts is not None:
                count_work(parts)
            if parts is None or any(part.meta.get("flops", 0) is None for part in calls(parts)):
                node.meta |= {"flops": product_flops(node), "estimated": True}
            else:
                estimated = any(part.meta.get("estimated") for part in calls(parts))
                node.meta |= {"flops": flops(parts), "estimated": estimated}


def product_flops(node: fx.Node) -> int | None:
    """Estimate an operator of unknown work by the matrix product of its two largest operands.

    A product [M, K] x [K, N] takes 2 MKN FLOPs, and its operands and its result have MK, KN and MN elements: the FLOPs
    are twice the square root of the three sizes' product. None for torch's own operators, for results that are not one
    tensor, and where fewer than two operands have two dims or more.
    """
    sizes = sorted(prod(shape_of(n)) for n in node.all_input_nodes if "shape" in n.meta and len(shape_of(n)) > 1)
    if getattr(node.target, "namespace", "aten") == "aten" or "shape" not in node.meta or len(sizes) < 2:
        return None
    return 2 * isqrt(sizes[-1] * sizes[-2] * prod(shape_of(node)))


class _Operand:
    """A tensor operand, compared by shape, strides, dtype and device."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self._form = (tuple(value.shape), value.stride(), value.dtype, value.device)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Operand) and self._form == other._form

    def __hash__(self) -> int:
        return hash(self._form)


@lru_cache(maxsize=1 << 12)
def _traced(target: Any, values: tuple[tuple[type, Any], ...], spec: pytree.TreeSpec) -> fx.Graph | None:
    if not isinstance(target, OpOverload):
        return None
    composite = is_composite(target)
    if not composite and target not in decomposition_table:
        return None
    operands = [v.value for _, v in values if isinstance(v, _Operand)]

    def function(*tensors: Tensor) -> Any:
        supply = iter(tensors)
        leaves = [next(supply) if isinstance(v, _Operand) else v for _, v in values]
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        return target(*args, **kwargs)

    table = {} if composite else {target: decomposition_table[target]}
    mode = operands[0].fake_mode
    try:
        with mode, torch.no_grad():
            traced = make_fx(function, decomposition_table=table)(*operands)
            if any(isinstance(n.target, OpOverload) and mutates(n.target) for n in traced.graph.nodes):
                traced = make_fx(functionalize(traced, remove="mutations"))(*operands)
            FakeTensorProp(traced, mode).propagate_dont_convert_inputs(*operands)
    except Exception:  # the decomposition reads values, or does not support these operands
        return None
    if any(node.op == "get_attr" for node in traced.graph.nodes):
        return None
    result = _normal(traced.graph)
    return None if any(node.target is target for node in result.nodes) else result


def _normal(traced: fx.Graph) -> fx.Graph:
    b = Builder()
    env: dict[fx.Node, Any] = {}
    for node in traced.nodes:
        b.source = node
        if isinstance(value := node.meta.get("val"), Tensor):
            node.meta |= {"shape": tuple(value.shape), "dtype": value.dtype}
        if node.op == "placeholder":
            env[node] = b.graph.placeholder(node.name)
            env[node].meta = dict(node.meta)
        elif node.op == "output":
            b.graph.output(map_arg(node.args[0], env.__getitem__))
        else:
            rewrite(b, node, env)
    b.graph.eliminate_dead_code()
    return b.graph
