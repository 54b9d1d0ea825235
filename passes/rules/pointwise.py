"""Pointwise operators with broadcasting: all operands get one layout. Slicing whole operands costs nothing.

Only operators that were checked are listed: torch's pointwise *tag* is not enough (law 3).
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ...capture import row_rules as rows
from ...capture.kinds import mutates
from ...ir.layout import Layout
from ...ir.operators import OpSpec
from ...ir.program import layout_of, shape_of
from ..forms import copies
from ..partition import Op, Partitioner

aten = torch.ops.aten


def align(p: Partitioner, shape: tuple[int, ...], values: list[fx.Node]) -> tuple[Layout, list[fx.Node]]:
    """Bring operands that broadcast to `shape` to one layout: the most even one among the largest operands.

    So a value that was computed from few, unevenly divided rows is cut again where it is combined with a value of many
    rows.
    """

    def out_layout(x: fx.Node) -> Layout | None:
        layout = layout_of(x)
        return layout.at(layout.dim + len(shape) - len(shape_of(x))) if layout.dim is not None else None

    candidates = [(prod(shape_of(x)), layout) for x in values if (layout := out_layout(x))]
    largest = max(size for size, _ in candidates)
    large = [(size, layout) for size, layout in candidates if 2 * size >= largest]
    _, layout = min(large, key=lambda each: (max(each[1].sizes) / shape[each[1].axis], -each[0]))
    return layout, [broadcast_to(p, x, layout, len(shape)) for x in values]


def broadcast_to(p: Partitioner, x: fx.Node, layout: Layout, ndim: int) -> fx.Node:
    """The part of `x` that broadcasts against a value of `ndim` dims with `layout`."""
    dim = layout.axis - (ndim - len(shape_of(x)))
    if dim < 0 or shape_of(x)[dim] == 1:
        return p.whole(x, "realign", "broadcast along the split dim")
    return p.lay(x, layout.at(dim), "realign", "operands cut differently")


def pointwise(p: Partitioner, op: Op, *args: Any, **kwargs: Any) -> fx.Node:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, fx.Node)]
    layout, values = align(p, op.shape, [leaves[i] for i in places])
    for i, value in zip(places, values, strict=True):
        leaves[i] = value
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return p.same(op, args, kwargs, layout=layout)


_NAMES = """
    abs absolute acos acosh add addcdiv addcmul __and__ angle arccos arctan arctan2 asin asinh atan atan2 atanh
    bitwise_and bitwise_not bitwise_or bitwise_xor ceil celu clamp clamp_max clamp_min clip clone complex _conj
    conj conj_physical copysign cos cosh div divide elu empty_like eq erf erfc erfinv exp exp2 expm1 fix
    float_power floor floor_divide fmax fmin fmod frac full_like ge gelu greater greater_equal gt hardshrink
    hardsigmoid hardswish hardtanh hypot imag isfinite isinf isnan ldexp le leaky_relu lerp less less_equal log
    log10 log1p log2 log_sigmoid logaddexp logical_and logical_not logical_or logical_xor logit __lshift__ lt
    masked_fill maximum minimum mish mul multiply nan_to_num ne neg negative not_equal ones_like __or__ polar
    pow real reciprocal relu relu6 remainder round __rshift__ rsqrt rsub selu sgn sigmoid sign signbit silu sin
    sinc sinh softplus softshrink sqrt square sub subtract tan tanh threshold _to_copy true_divide trunc where
    xlogy __xor__ zeros_like
"""
#: operators of which only this overload is pointwise
OVERLOADS = (aten.max.other, aten.min.other)
TABLE = {
    getattr(packet, overload): OpSpec(pointwise, row_wise=rows.pointwise)
    for packet in (getattr(aten, name) for name in _NAMES.split())
    for overload in packet.overloads()
    if not mutates(getattr(packet, overload)) and getattr(packet, overload) is not aten.where.default  # `nonzero`
}
TABLE |= dict.fromkeys(OVERLOADS, OpSpec(pointwise, row_wise=rows.pointwise)) | {
    aten.clone.default: OpSpec(pointwise, form=copies.clone, row_wise=rows.same),
    aten._to_copy.default: OpSpec(pointwise, form=copies.to_copy, row_wise=rows.same),
    aten._conj.default: OpSpec(pointwise, form=copies.conjugated, row_wise=rows.pointwise),
    aten._neg_view.default: OpSpec(pointwise, form=copies.negated, row_wise=rows.pointwise),
    aten.empty_like.default: OpSpec(pointwise, row_wise=rows.like),
    aten.zeros_like.default: OpSpec(pointwise, row_wise=rows.like),
    aten.full_like.default: OpSpec(pointwise, row_wise=rows.like),
}
