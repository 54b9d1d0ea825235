"""Reductions: local unless the split dim is reduced. Then the ranks' partial results are merged."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, Literal

import torch
from torch import fx

from ...capture import row_rules as rows
from ...ir.layout import Layout
from ...ir.merge import ReduceOp
from ...ir.operators import OpSpec
from ...ir.program import layout_of, shape_of
from ..forms import reductions as forms
from ..partition import Op, Partitioner, Rule, SplitError
from .normalization import moments, wide

aten = torch.ops.aten


def _dims(dims: Any, ndim: int) -> list[int]:
    if dims is None or (isinstance(dims, Sequence) and len(dims) == 0):
        return list(range(ndim))
    return [d % ndim for d in ([dims] if isinstance(dims, int) else dims)]


def _without(layout: Layout, dims: list[int], keepdim: bool) -> Layout:
    """The layout after a reduction over `dims`, none of which is split."""
    return layout.at(layout.axis - (0 if keepdim else sum(d < layout.axis for d in dims)))


def reduction(partial: ReduceOp | Literal["mean"]) -> Rule:
    """A rule for a reduction of (x, dims, keepdim, …); `partial` merges the ranks' results."""

    def rule(p: Partitioner, op: Op, x: fx.Node, dims: Any = None, keepdim: bool = False, **kwargs: Any) -> fx.Node:
        layout, shape = layout_of(x), shape_of(x)
        inside = _dims(dims, len(shape))
        if layout.axis not in inside:
            return p.same(op, (x, dims, keepdim), kwargs, layout=_without(layout, inside, keepdim))
        if partial == "mean":
            dtype = op.dtype if op.dtype.is_complex else wide(op.dtype)  # the sum may overflow where the mean does not
            count = prod(shape[d] for d in inside)
            part = p.emit(
                aten.sum.dim_IntList, (p.owned(x), inside, keepdim), {"dtype": dtype}, shape=op.shape, dtype=dtype
            )
            mean = p.emit(aten.div.Scalar, (p.reduce(part, may_be_stale=True), count), shape=op.shape, dtype=dtype)
            return p.emit(aten._to_copy.default, (mean,), {"dtype": op.dtype}, shape=op.shape, dtype=op.dtype)
        # a row must be summed once; a maximum may count it twice, and is not defined where a rank owns no row
        x = p.owned(x) if partial in ("sum", "prod") else x
        dims = dims if isinstance(dims, int) else inside
        return p.reduce(p.same(op, (x, dims, keepdim), kwargs, layout=Layout()), partial, may_be_stale=True)

    return rule


def truth(partial: ReduceOp) -> Rule:
    """`any` merges the ranks' results by their maximum, `all` by their minimum."""

    def rule(p: Partitioner, op: Op, x: fx.Node, dims: Any = None, keepdim: bool = False) -> fx.Node:
        layout, inside = layout_of(x), _dims(dims, len(shape_of(x)))
        if layout.axis not in inside:
            return p.same(op, (x, dims, keepdim), layout=_without(layout, inside, keepdim))
        return p.reduce(p.same(op, (x, dims, keepdim), layout=Layout()), partial)

    return rule


def whole_sum(p: Partitioner, op: Op, x: fx.Node, **kwargs: Any) -> fx.Node | tuple[fx.Node, ...]:
    """`x.sum()` and `x.mean()` over all elements."""
    reduce = aten.sum.dim_IntList if op.target is aten.sum.default else aten.mean.dim
    inner = Op(op.node, reduce)
    return reduction("sum" if op.target is aten.sum.default else "mean")(p, inner, x, None, False, **kwargs)


def whole_product(p: Partitioner, op: Op, x: fx.Node, **kwargs: Any) -> fx.Node:
    return p.reduce(p.same(op, (p.owned(x),), kwargs, layout=Layout()), "prod", may_be_stale=True)


def variance(
    p: Partitioner, op: Op, x: fx.Node, dims: Any = None, *, correction: float | None = None, keepdim: bool = False
) -> fx.Node | tuple[fx.Node, ...]:
    """`var` and `var_mean`."""
    layout, shape = layout_of(x), shape_of(x)
    inside = _dims(dims, len(shape))
    both = op.target is aten.var_mean.correction
    kwargs = {"correction": correction, "keepdim": keepdim}
    if layout.axis not in inside:
        result = _without(layout, inside, keepdim)
        return (
            p.several(op, (x, dims), kwargs, [result, result]) if both else p.same(op, (x, dims), kwargs, layout=result)
        )
    if x.meta["dtype"].is_complex:
        raise SplitError("it is complex: moments are merged for real numbers only")
    mean, biased = moments(p, x, inside)
    count = 1
    for d in inside:
        count *= shape[d]
    unbiased = count / max(count - (1 if correction is None else correction), 0.0)
    values = [p.emit(aten.mul.Scalar, (biased, unbiased), shape=shape_of(biased), dtype=biased.meta["dtype"]), mean]
    out = op.node.meta["val"][0] if both else op.node.meta["val"]
    values = [
        p.emit(
            aten._to_copy.default,
            (p.emit(aten.reshape.default, (v, list(out.shape)), shape=out.shape, dtype=v.meta["dtype"]),),
            {"dtype": out.dtype},
            shape=out.shape,
            dtype=out.dtype,
        )
        for v in values
    ]
    return tuple(values) if both else values[0]


def vector_norm(
    p: Partitioner, op: Op, x: fx.Node, order: float = 2, dims: Any = None, keepdim: bool = False, **kwargs: Any
) -> fx.Node:
    """The Euclidean norm of the ranks' norms. Other orders are local only."""
    layout, shape = layout_of(x), shape_of(x)
    inside = _dims(dims, len(shape))
    if layout.axis not in inside:
        return p.same(op, (x, order, dims, keepdim), kwargs, layout=_without(layout, inside, keepdim))
    if order != 2 or x.meta["dtype"].is_complex:
        raise SplitError(f"it takes a norm of order {order} over the split dim")
    dtype = wide(op.dtype)
    part = p.emit(op.target, (p.owned(x), order, inside, keepdim), {"dtype": dtype}, shape=op.shape, dtype=dtype)
    total = p.reduce(p.emit(aten.square.default, (part,), shape=op.shape, dtype=dtype), may_be_stale=True)
    root = p.emit(aten.sqrt.default, (total,), shape=op.shape, dtype=dtype)
    return p.emit(aten._to_copy.default, (root,), {"dtype": op.dtype}, shape=op.shape, dtype=op.dtype)


TABLE = {
    aten.sum.dim_IntList: OpSpec(reduction("sum"), row_wise=rows.along(0)),
    aten.sum.default: OpSpec(whole_sum),
    aten.mean.dim: OpSpec(reduction("mean"), row_wise=rows.along(0)),
    aten.mean.default: OpSpec(whole_sum),
    aten.amax.default: OpSpec(reduction("amax"), row_wise=rows.along(0)),
    aten.amin.default: OpSpec(reduction("amin"), row_wise=rows.along(0)),
    aten.any.dim: OpSpec(truth("amax"), row_wise=rows.along(0)),
    aten.all.dim: OpSpec(truth("amin"), row_wise=rows.along(0)),
    aten.any.dims: OpSpec(truth("amax")),
    aten.all.dims: OpSpec(truth("amin")),
    aten.var.correction: OpSpec(variance, form=forms.variance(forms.correction, root=False, mean=False)),
    aten.var_mean.correction: OpSpec(variance, form=forms.variance(forms.correction, root=False, mean=True)),
    aten.linalg_vector_norm.default: OpSpec(vector_norm),
    aten.prod.dim_int: OpSpec(reduction("prod")),
    aten.prod.default: OpSpec(whole_product),
}
