"""Norms. Statistics over the split dim are merged from the moments of all ranks (role `moments`); others are local."""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from math import prod
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from ...capture import row_rules as rows
from ...ir import ops
from ...ir.layout import Layout, owned
from ...ir.operators import OpSpec
from ...ir.program import layout_of, shape_of
from ..forms import reductions as forms
from ..partition import Op, Partitioner, Rule, SplitError

aten = torch.ops.aten
OWN_STATISTICS = "it computes batch statistics"


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics: float32 at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def norm(function: Rule) -> Rule:
    """Fetch weights and given statistics whole; apply `function` only if `x` is split."""

    @wraps(function)
    def rule(p: Partitioner, op: Op, x: fx.Node, *args: Any, **kwargs: Any) -> fx.Node | tuple[fx.Node, ...]:
        args, kwargs = map_arg((args, kwargs), lambda w: p.whole(w, "realign", "weights of a norm are used whole"))
        if not layout_of(x).split:
            return p.same(op, (x, *args), kwargs, layout=Layout())
        return function(p, op, x, *args, **kwargs)

    return rule


@norm
def group_norm(
    p: Partitioner,
    op: Op,
    x: fx.Node,
    groups: int,
    weight: fx.Node | None = None,
    bias: fx.Node | None = None,
    eps: float = 1e-5,
    cudnn: bool = True,
) -> fx.Node:
    """Each rank normalizes its rows by the moments of all ranks."""
    layout, shape = layout_of(x), shape_of(x)
    if layout.dim == 0:
        return p.same(op, (x, groups, weight, bias, eps, cudnn), layout=layout)
    if layout.dim == 1:
        raise SplitError("the channels are split")
    row = prod(shape[1:]) // groups // shape[layout.axis]
    local = p.emit(ops.group_moments, (p.owned(x), groups), shape=(2, shape[0], groups), dtype=wide(op.dtype))
    merged = p.moments(local, [len(rows) * row for rows in owned(layout.rows)], may_be_stale=True)
    return p.emit(
        ops.group_normalize, (x, merged, groups, weight, bias, eps), shape=op.shape, dtype=op.dtype, layout=layout
    )


def moments(p: Partitioner, x: fx.Node, dims: Sequence[int]) -> tuple[fx.Node, fx.Node]:
    """Mean and biased variance over `dims`, which include the split dim and stay as size 1; float32 at least."""
    shape, layout = shape_of(x), layout_of(x)
    reduced = tuple(1 if d in dims else s for d, s in enumerate(shape))
    dtype = wide(x.meta["dtype"])
    row = prod(shape[d] for d in dims) // shape[layout.axis]
    local = p.emit(ops.moments, (p.owned(x), list(dims)), shape=(2, *reduced), dtype=dtype)
    merged = p.moments(local, [len(rows) * row for rows in owned(layout.rows)], may_be_stale=True)
    mean, variance = (p.emit(aten.select.int, (merged, 0, i), shape=reduced, dtype=dtype) for i in (0, 1))
    return mean, variance


@norm
def layer_norm(
    p: Partitioner,
    op: Op,
    x: fx.Node,
    normalized: list[int],
    weight: fx.Node | None = None,
    bias: fx.Node | None = None,
    eps: float = 1e-5,
    cudnn: bool = True,
) -> fx.Node:
    """Each rank normalizes its rows; if a normalized dim is split, by the moments of all ranks."""
    layout = layout_of(x)
    first = len(op.shape) - len(normalized)
    if layout.axis < first:
        return p.same(op, (x, normalized, weight, bias, eps, cudnn), layout=layout)
    mean, variance = moments(p, x, range(first, len(op.shape)))
    dtype = wide(op.dtype)

    def step(target: object, *args: object, layout: Layout = layout, shape: tuple[int, ...] = op.shape) -> fx.Node:
        return p.emit(target, args, shape=shape, dtype=dtype, layout=layout)

    scale = step(aten.rsqrt.default, step(aten.add.Scalar, variance, eps, layout=Layout(), shape=shape_of(variance)),
                 layout=Layout(), shape=shape_of(variance))  # fmt: skip
    y = step(aten.mul.Tensor, step(aten.sub.Tensor, x, mean), scale)
    at = layout.at(layout.axis - first)
    if weight is not None:
        y = step(aten.mul.Tensor, y, p.lay(weight, at))
    if bias is not None:
        y = step(aten.add.Tensor, y, p.lay(bias, at))
    return p.emit(aten._to_copy.default, (y,), {"dtype": op.dtype}, shape=op.shape, dtype=op.dtype, layout=layout)


@norm
def rms_norm(
    p: Partitioner, op: Op, x: fx.Node, normalized: list[int], weight: fx.Node | None = None, eps: float | None = None
) -> fx.Node:
    layout = layout_of(x)
    if layout.axis >= len(op.shape) - len(normalized):
        raise SplitError("a normalized dim is split")
    return p.same(op, (x, normalized, weight, eps), layout=layout)


@norm
def batch_norm(
    p: Partitioner,
    op: Op,
    x: fx.Node,
    weight: fx.Node | None,
    bias: fx.Node | None,
    mean: fx.Node | None,
    variance: fx.Node | None,
    training: bool,
    *rest: object,
) -> fx.Node:
    layout = layout_of(x)
    if training:
        raise SplitError(OWN_STATISTICS)
    if layout.dim == 1:
        raise SplitError("the channels are split")
    return p.same(op, (x, weight, bias, mean, variance, training, *rest), layout=layout)


def own_statistics(p: Partitioner, op: Op, *_: object) -> fx.Node:
    raise SplitError(OWN_STATISTICS)


TABLE = {
    aten.native_batch_norm.default: OpSpec(own_statistics, form=forms.batch_norm),
    aten.group_norm.default: OpSpec(group_norm),
    aten.layer_norm.default: OpSpec(layer_norm, row_wise=rows.norm),
    aten.rms_norm.default: OpSpec(rms_norm, row_wise=rows.norm),
    aten.batch_norm.default: OpSpec(batch_norm),
}
