"""Operators that work along one dim: softmax, running sums, sorting. They are local unless that dim is split.

Along the split dim, ranks exchange little:

    softmax         each rank's maximum and sum of exponentials
    running sum     the totals of the ranks before
    argmax          the maximum, then the first position that has it
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ...capture import row_rules as rows
from ...capture.rows import argsort, sort
from ...ir import ops
from ...ir.layout import Layout, Rows, even, owned, per_rank
from ...ir.merge import ReduceOp
from ...ir.operators import OpSpec
from ...ir.program import layout_of, shape_of
from ..partition import Op, Partitioner, Rule, SplitError
from .normalization import wide

aten = torch.ops.aten


def along(place: int, default: int | None = None, outputs: int = 1) -> Callable[..., Any]:
    """A rule for an operator on one tensor that works along the dim in argument `place`. Other dims may be split."""

    def rule(p: Partitioner, op: Op, *args: Any, **kwargs: Any) -> Any:
        x = args[0]
        layout, ndim = layout_of(x), len(shape_of(x))
        dim = kwargs.get("dim", args[place] if len(args) > place else default)
        if dim % ndim == layout.dim:
            raise SplitError(f"it works along the split dim {layout.dim}")
        if len(op_shape(op)) < ndim:  # kthvalue and median drop the dim
            layout = layout.at(layout.axis - (dim % ndim < layout.axis))
        if outputs == 1:
            return p.same(op, args, kwargs, layout=layout)
        return p.several(op, args, kwargs, [layout] * outputs)

    return rule


def op_shape(op: Op) -> tuple[int, ...]:
    """The shape of the operator's (first) result."""
    value = op.node.meta["val"]
    return tuple((value[0] if isinstance(value, (tuple, list)) else value).shape)


# -- softmax ------------------------------------------------------------------------------------------------------


def exponentials(p: Partitioner, x: fx.Node, dims: list[int]) -> tuple[fx.Node, fx.Node]:
    """The maximum and the sum of exp(x - maximum) over `dims`, which include the split dim and stay as size 1."""
    reduced, dtype = tuple(1 if d in dims else s for d, s in enumerate(shape_of(x))), x.meta["dtype"]
    part = p.emit(ops.exponentials, (p.owned(x), dims), shape=(2, *reduced), dtype=dtype)
    merged = p.reduce(part, "exponentials", may_be_stale=True)
    most, total = (p.emit(aten.select.int, (merged, 0, i), shape=reduced, dtype=dtype) for i in (0, 1))
    return most, total


def softmax(logarithm: bool) -> Rule:
    def rule(p: Partitioner, op: Op, x: fx.Node, dim: int, *rest: Any, **kwargs: Any) -> fx.Node:
        layout, dim = layout_of(x), dim % len(op.shape)
        if layout.axis != dim:
            return p.same(op, (x, dim, *rest), kwargs, layout=layout)
        dtype = wide(op.dtype)
        x = _cast(p, x, dtype)
        most, total = exponentials(p, x, [dim])
        y = p.emit(aten.sub.Tensor, (x, most), shape=op.shape, dtype=dtype, layout=layout)
        if logarithm:
            total = p.emit(aten.log.default, (total,), shape=shape_of(total), dtype=dtype)
            y = p.emit(aten.sub.Tensor, (y, total), shape=op.shape, dtype=dtype, layout=layout)
        else:
            y = p.emit(aten.exp.default, (y,), shape=op.shape, dtype=dtype, layout=layout)
            y = p.emit(aten.div.Tensor, (y, total), shape=op.shape, dtype=dtype, layout=layout)
        return _cast(p, y, op.dtype)

    return rule


def logsumexp(p: Partitioner, op: Op, x: fx.Node, dims: Any, keepdim: bool = False) -> fx.Node:
    layout, ndim = layout_of(x), len(shape_of(x))
    inside = [d % ndim for d in ([dims] if isinstance(dims, int) else dims or range(ndim))]
    if layout.axis not in inside:
        gone = 0 if keepdim else sum(d < layout.axis for d in inside)
        return p.same(op, (x, dims, keepdim), layout=layout.at(layout.axis - gone))
    dtype = wide(op.dtype)
    most, total = exponentials(p, _cast(p, x, dtype), inside)
    y = p.emit(aten.log.default, (total,), shape=shape_of(total), dtype=dtype)
    y = p.emit(aten.add.Tensor, (y, most), shape=shape_of(total), dtype=dtype)
    return _cast(p, p.emit(aten.reshape.default, (y, list(op.shape)), shape=op.shape, dtype=dtype), op.dtype)


def _cast(p: Partitioner, x: fx.Node, dtype: torch.dtype) -> fx.Node:
    if x.meta["dtype"] == dtype:
        return x
    return p.emit(aten._to_copy.default, (x,), {"dtype": dtype}, shape=shape_of(x), dtype=dtype, layout=layout_of(x))


# -- running sums -------------------------------------------------------------------------------------------------


def running(join: Any, neutral: float) -> Rule:
    """`cumsum` and `cumprod`: a local running sum, to which the total of the ranks before is added."""

    def rule(p: Partitioner, op: Op, x: fx.Node, dim: int, *, dtype: torch.dtype | None = None) -> fx.Node:
        layout, ndim = layout_of(x), len(op.shape)
        dim = dim % ndim
        if layout.axis != dim:
            return p.same(op, (x, dim), {"dtype": dtype}, layout=layout)
        ordered = all(r.contiguous for r in layout.rows) and all(
            a.stop == b.start for a, b in zip(layout.rows, layout.rows[1:], strict=False)
        )
        if not ordered:
            if op.shape[dim] < p.world:
                raise SplitError(f"fewer rows than ranks along dim {dim}")
            layout = Layout(dim, even(op.shape[dim], p.world))
            x = p.lay(x, layout, "realign", "running sums go from rank to rank")
        inner = wide(op.dtype) if op.dtype.is_floating_point else op.dtype
        y = p.emit(op.target, (x, dim), {"dtype": inner}, shape=op.shape, dtype=inner, layout=layout)
        each = tuple(Rows.interval(k, k + 1) for k in range(p.world))
        shape = tuple(p.world if d == dim else s for d, s in enumerate(op.shape))
        last = per_rank([Rows.interval(len(r) - 1, len(r)) for r in layout.rows])
        totals = p.emit(ops.take, (y, dim, last), shape=shape, dtype=inner, layout=Layout(dim, each))
        totals = p.whole(totals, "sum", may_be_stale=True)
        pad = [0] * (2 * (ndim - 1 - dim)) + [1, -1]
        totals = p.emit(aten.constant_pad_nd.default, (totals, pad, neutral), shape=shape, dtype=inner)
        before = p.take(p.emit(op.target, (totals, dim), {"dtype": inner}, shape=shape, dtype=inner), dim, each)
        return _cast(p, p.emit(join, (y, before), shape=op.shape, dtype=inner, layout=layout), op.dtype)

    return rule


# -- positions ----------------------------------------------------------------------------------------------------


def extreme(largest: bool, both: bool) -> Rule:
    """`argmax`, `argmin`, `max` and `min` along a dim: the first position that has the extreme value."""

    def rule(p: Partitioner, op: Op, x: fx.Node, dim: int | None = None, keepdim: bool = False) -> Any:
        if dim is None:
            raise SplitError("it works on the flattened tensor")
        layout, shape = layout_of(x), shape_of(x)
        dim = dim % len(shape)
        if layout.axis != dim:
            layout = layout.at(layout.axis - (not keepdim and dim < layout.axis))
            if both:
                return p.several(op, (x, dim, keepdim), None, [layout, layout])
            return p.same(op, (x, dim, keepdim), layout=layout)
        reduced = tuple(1 if d == dim else s for d, s in enumerate(shape))
        name: ReduceOp = "amax" if largest else "amin"
        reduce = getattr(aten, name).default
        if all(rows.runs for rows in owned(layout.rows)):  # copies of a row may be rounded in other ways
            x = p.owned(x)
            layout = layout_of(x)
        # never stale: the positions are found by comparing for equality
        value = p.reduce(p.emit(reduce, (x, [dim], True), shape=reduced, dtype=x.meta["dtype"]), name)

        def compared(target: Any, *args: Any) -> fx.Node:
            return p.emit(target, args, shape=shape, dtype=torch.bool, layout=layout)

        found = compared(aten.logical_or.default, compared(aten.eq.Tensor, x, value), compared(aten.ne.Tensor, x, x))
        size, device = shape[dim], op.node.meta["val"][0].device if both else op.node.meta["val"].device
        place = p.emit(aten.arange.default, (size,), {"device": device}, shape=(size,), dtype=torch.int64)
        column = tuple(size if d == dim else 1 for d in range(len(shape)))
        place = p.emit(aten.reshape.default, (place, list(column)), shape=column, dtype=torch.int64)
        place = p.emit(
            aten.where.ScalarOther, (found, p.take(place, dim, layout.rows), size), shape=shape, dtype=torch.int64,
            layout=layout,
        )  # fmt: skip
        position = p.reduce(p.emit(aten.amin.default, (place, [dim], True), shape=reduced, dtype=torch.int64), "amin")
        target = op_shape(op)
        results = [
            p.emit(aten.reshape.default, (r, list(target)), shape=target, dtype=r.meta["dtype"])
            for r in (value, position)
        ]
        return tuple(results) if both else results[1]

    return rule


TABLE = {
    aten.softmax.int: OpSpec(softmax(logarithm=False), row_wise=rows.along(0)),
    aten._softmax.default: OpSpec(softmax(logarithm=False), row_wise=rows.along(0)),
    aten._safe_softmax.default: OpSpec(along(1)),
    aten.log_softmax.int: OpSpec(softmax(logarithm=True), row_wise=rows.along(0)),
    aten._log_softmax.default: OpSpec(softmax(logarithm=True)),
    aten.logsumexp.default: OpSpec(logsumexp),
    aten.cumsum.default: OpSpec(running(aten.add.Tensor, 0.0)),
    aten.cumprod.default: OpSpec(running(aten.mul.Tensor, 1.0)),
    aten.logcumsumexp.default: OpSpec(along(1)),
    aten.cummax.default: OpSpec(along(1, outputs=2)),
    aten.cummin.default: OpSpec(along(1, outputs=2)),
    aten.argmax.default: OpSpec(extreme(largest=True, both=False), row_wise=rows.along(0)),
    aten.argmin.default: OpSpec(extreme(largest=False, both=False)),
    aten.max.dim: OpSpec(extreme(largest=True, both=True)),
    aten.min.dim: OpSpec(extreme(largest=False, both=True)),
    aten.glu.default: OpSpec(along(1, -1), row_wise=rows.along(0, -1)),
    aten.sort.default: OpSpec(along(1, -1, outputs=2), row_wise=sort),
    aten.sort.stable: OpSpec(along(2, -1, outputs=2), row_wise=sort),
    aten.argsort.default: OpSpec(row_wise=argsort),
    aten.argsort.stable: OpSpec(row_wise=argsort),
    aten.topk.default: OpSpec(along(2, -1, outputs=2), row_wise=rows.along(1, -1)),
    aten.kthvalue.default: OpSpec(along(2, -1, outputs=2)),
    aten.median.dim: OpSpec(along(1, outputs=2)),
}
