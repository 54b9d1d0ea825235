"""Attention: each rank computes its own queries; it fetches all keys and values (role `keys_values`).

This is exact for any mask. A mask is sliced along the queries; a causal mask is built for the rank's query positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import fx

from ...ir import ops
from ...ir.layout import Layout, Rows, even, per_rank
from ...ir.operators import OpSpec
from ...ir.program import layout_of, reached, shape_of
from ..partition import Op, Partitioner, SplitError
from . import pointwise, views
from .pointwise import broadcast_to

aten = torch.ops.aten
Shape = Sequence[int]
SOFTMAX = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default}
THROUGH = {*pointwise.TABLE, *views.TABLE, ops.take, aten.slice.Tensor}


def attention(
    p: Partitioner,
    op: Op,
    query: fx.Node,
    key: fx.Node,
    value: fx.Node,
    attn_mask: fx.Node | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> fx.Node:
    """`scaled_dot_product_attention` of query [..., L, E], key [..., S, E], value [..., S, Ev]."""
    ndim = len(op.shape)
    kwargs = {"scale": scale, "enable_gqa": enable_gqa}
    operands = [x for x in (query, key, value, attn_mask) if x is not None]
    batch = next(
        (
            layout.at(layout.dim + ndim - len(shape_of(x)))
            for x in operands
            if (layout := layout_of(x)).dim is not None and layout.dim < len(shape_of(x)) - 2
        ),
        None,
    )
    if batch is not None:
        if enable_gqa and batch.dim == ndim - 3:
            group = op.shape[-3] // max(r.stop for r in batch.rows)  # 1 if the queries are split
            batch = Layout(batch.dim, tuple(Rows.of(_spread(r, group)) for r in batch.rows))
            key, value = (_each_head(p, x, shape_of(query)[-3]) for x in (key, value))
            kwargs["enable_gqa"] = False
        query, key, value = (broadcast_to(p, x, batch, ndim) for x in (query, key, value))
        mask = broadcast_to(p, attn_mask, batch, ndim) if attn_mask is not None else None
        return p.same(op, (query, key, value, mask, dropout_p, is_causal), kwargs, layout=batch)

    if layout_of(query).dim == len(shape_of(query)) - 1:
        reason, length = "the channels of a head are used together", shape_of(query)[-2]
        if length < p.world:
            raise SplitError(reason)
        query = p.lay(query, Layout(len(shape_of(query)) - 2, even(length, p.world)), "realign", reason)
    key = p.whole(key, "keys_values", may_be_stale=True)
    value = p.whole(value, "keys_values", may_be_stale=True)
    layout = layout_of(query)
    if layout.dim is None:
        mask = p.whole(attn_mask, "realign") if attn_mask is not None else None
        return p.same(op, (query, key, value, mask, dropout_p, is_causal), kwargs, layout=layout)
    layout = layout.at(ndim - 2)
    if is_causal:
        length, keys = shape_of(query)[-2], shape_of(key)[-2]
        mask = p.emit(
            ops.causal_mask, (per_rank(layout.rows), keys, query), shape=(length, keys), dtype=torch.bool,
            layout=Layout(0, layout.rows),
        )  # fmt: skip
    else:
        mask = broadcast_to(p, attn_mask, layout, ndim) if attn_mask is not None else None
    return p.same(op, (query, key, value, mask, dropout_p, False), kwargs, layout=layout)


def is_key_or_value(product: fx.Node, as_key: bool, others: Iterable[fx.Node]) -> bool:
    """Whether an operand of a matrix product is the keys or the values of hand-written attention.

    Args:
        product: the product, in the graph of whole values.
        as_key: whether the operand's tokens are a dim of the result (keys) or are summed over (values).
        others: the product's other operands, in the partitioned graph.
    """
    if as_key:
        return _leads_to_softmax([product], lambda node: node.users)
    return _leads_to_softmax(others, lambda node: node.all_input_nodes)


def _leads_to_softmax(nodes: Iterable[fx.Node], step: Callable[[fx.Node], Iterable[fx.Node]]) -> bool:
    """Whether `step` leads from `nodes` to a softmax through pointwise operators and views only."""

    def onward(node: fx.Node) -> Iterable[fx.Node]:
        return (each for each in step(node) if each.target in THROUGH or each.target in SOFTMAX)

    return any(node.target in SOFTMAX for node in reached(nodes, onward))


def _spread(rows: Rows, group: int) -> np.ndarray:
    """The query heads that belong to the groups `rows` of keys."""
    return (rows.array[:, None] * group + np.arange(group)).reshape(-1)


def _each_head(p: Partitioner, x: fx.Node, heads: int) -> fx.Node:
    """Grouped keys or values, repeated for each query head."""
    x = p.whole(x, "keys_values", may_be_stale=True)
    shape, dim = shape_of(x), len(shape_of(x)) - 3
    index = ops.Index(np.arange(heads) // (heads // shape[dim]))
    wide = (*shape[:dim], heads, *shape[dim + 1 :])
    return p.emit(ops.select, (x, dim, index), shape=wide, dtype=x.meta["dtype"])


def _flops(out: Shape, query: Shape, key: Shape, value: Shape, *_: Any) -> int:
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


TABLE = {aten.scaled_dot_product_attention.default: OpSpec(attention, flops=_flops)}
