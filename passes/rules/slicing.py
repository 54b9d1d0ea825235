"""Slices, concatenation, padding, flips and rolls: they change positions along a dim. Most need no exchange."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from ...capture import row_rules
from ...ir import ops
from ...ir.layout import Layout, Rows, per_rank
from ...ir.operators import OpSpec
from ...ir.program import layout_of, shape_of
from ..forms import slicing as forms
from ..forms import views
from ..partition import Op, Partitioner, SplitError
from .pointwise import align

aten = torch.ops.aten


def slice_(p: Partitioner, op: Op, x: fx.Node, dim: int, start: int, end: int, step: int = 1) -> fx.Node:
    return cut(p, x, dim, start, end, step)


def cut(p: Partitioner, x: fx.Node, dim: int, start: int, end: int, step: int = 1) -> fx.Node:
    """Rows start:end:step of a split value."""
    layout = layout_of(x)
    if layout.dim != dim:
        shape = (*shape_of(x)[:dim], len(range(start, end, step)), *shape_of(x)[dim + 1 :])
        args = (x, dim, start, end, step)
        return p.emit(aten.slice.Tensor, args, shape=shape, dtype=x.meta["dtype"], layout=layout)
    if step != 1:
        return remap(p, x, dim, np.arange(start, end, step))
    inside = [have & Rows.interval(start, end) for have in layout.rows]
    local = [have.locate(rows) for have, rows in zip(layout.rows, inside, strict=True)]
    return _moved(p, x, dim, end - start, [rows.shift(-start) for rows in inside], ops.take, local)


def remap(p: Partitioner, x: fx.Node, dim: int, sources: np.ndarray) -> fx.Node:
    """Row o of the result is row `sources[o]` of `x`, on the same rank, so that nothing is exchanged."""
    layout = layout_of(x)
    rows, local = [], []
    for have in layout.rows:
        mine = Rows.of(np.flatnonzero(np.isin(sources, have.array)))
        rows.append(mine)
        at = np.searchsorted(have.array, sources[mine.array])
        ascending = len(at) < 2 or bool(np.all(np.diff(at) > 0))
        local.append(Rows.of(at) if ascending else ops.Index(at))
    if all(isinstance(index, Rows) for index in local):
        target: Any = ops.take
    else:
        target = ops.select
        local = [ops.Index(index.array) for index in local]
    return _moved(p, x, dim, len(sources), rows, target, local)


def _moved(p: Partitioner, x: fx.Node, dim: int, size: int, rows: list[Rows], target: Any, local: list[Any]) -> fx.Node:
    """Apply `target`, which picks `local` rows of `x`. They are the ranks' `rows` of the new dim, which has `size`."""
    shape = (*shape_of(x)[:dim], size, *shape_of(x)[dim + 1 :])
    layout = Layout(dim, tuple(rows))
    return p.settle(p.emit(target, (x, dim, per_rank(local)), shape=shape, dtype=x.meta["dtype"], layout=layout))


def flip(p: Partitioner, op: Op, x: fx.Node, dims: list[int]) -> fx.Node:
    dim = layout_of(x).axis
    inside = [d % len(op.shape) for d in dims]
    if dim in inside:
        x = remap(p, x, dim, np.arange(op.shape[dim])[::-1])
        inside.remove(dim)
    return p.same(op, (x, inside), layout=layout_of(x)) if inside else x


def roll(p: Partitioner, op: Op, x: fx.Node, shifts: list[int], dims: list[int]) -> fx.Node:
    layout = layout_of(x)
    others = []
    for shift, dim in zip(shifts, dims, strict=True):
        if dim % len(op.shape) == layout.dim:
            x = remap(p, x, layout.axis, np.roll(np.arange(op.shape[layout.axis]), shift))
        else:
            others.append((shift, dim))
    if not others:
        return x
    return p.same(op, (x, [s for s, _ in others], [d for _, d in others]), layout=layout_of(x))


def cat(p: Partitioner, op: Op, tensors: list[fx.Node], dim: int = 0) -> fx.Node:
    dim = dim % len(op.shape)
    layouts = [layout_of(x) for x in tensors]
    if any(layout.dim not in (None, dim) for layout in layouts):
        tensors = [p.whole(x, "realign", "cut along the joint") if layout_of(x).dim == dim else x for x in tensors]
        shape = tuple(1 if d == dim else s for d, s in enumerate(op.shape))
        layout, tensors = align(p, shape, tensors)
        return p.same(op, (tensors, dim), layout=layout)
    rows = [Rows(())] * p.world
    offset = 0
    for x in tensors:
        rows = [a | b.shift(offset) for a, b in zip(rows, p.rows(x, dim), strict=True)]
        offset += shape_of(x)[dim]
    return p.same(op, (tensors, dim), layout=Layout(dim, tuple(rows)))


def constant_pad(p: Partitioner, op: Op, x: fx.Node, pad: list[int], value: float = 0) -> fx.Node:
    """Ranks that hold the first or the last row add the padding there."""
    layout, ndim = layout_of(x), len(op.shape)
    place = 2 * (ndim - 1 - layout.axis)
    if place >= len(pad) or pad[place] == pad[place + 1] == 0:
        return p.same(op, (x, pad, value), layout=layout)
    first, last, rows = _padded(layout, shape_of(x)[layout.axis], pad[place], pad[place + 1])
    amounts = [*pad[:place], per_rank(first), per_rank(last), *pad[place + 2 :]]
    return p.same(op, (x, amounts, value), layout=Layout(layout.dim, rows))


def _padded(layout: Layout, size: int, before: int, after: int) -> tuple[list[int], list[int], tuple[Rows, ...]]:
    """(rows that each rank adds before, rows that it adds after, its rows of the padded value)."""
    if before < 0 or after < 0:
        raise SplitError(f"its padding along the split dim {layout.dim} is negative")
    first = [before if 0 in r.array[:1] else 0 for r in layout.rows]
    last = [after if size - 1 in r.array[-1:] else 0 for r in layout.rows]
    rows = tuple(
        Rows.interval(0, f) | r.shift(before) | Rows.interval(before + size, before + size + extra)
        for r, f, extra in zip(layout.rows, first, last, strict=True)
    )
    return first, last, rows


def mirrored_pad(p: Partitioner, op: Op, x: fx.Node, pad: list[int], mode: str, value: float | None = None) -> fx.Node:
    """Reflect, replicate or circular padding: copies of rows, which are fetched if another rank holds them."""
    layout, ndim = layout_of(x), len(op.shape)
    dim, place = layout.axis, 2 * (ndim - 1 - layout.axis)
    rest = list(pad)
    if place < len(pad) and (pad[place] or pad[place + 1]):
        before, after = pad[place], pad[place + 1]
        size = shape_of(x)[dim]
        _, _, rows = _padded(layout, size, before, after)
        rest[place] = rest[place + 1] = 0
        spread = torch.arange(size, dtype=torch.float64)[None, None]
        sources = torch.nn.functional.pad(spread, (before, after), mode=mode)[0, 0].long().numpy()
        x = p.fetch(x, dim, tuple(Rows.of(sources[r.array]) for r in rows), "halo", may_be_stale=True)
        local = [
            ops.Index(np.searchsorted(have.array, sources[r.array]))
            for r, have in zip(rows, p.rows(x, dim), strict=True)
        ]
        shape = (*shape_of(x)[:dim], op.shape[dim], *shape_of(x)[dim + 1 :])
        layout = Layout(dim, rows)
        x = p.emit(ops.select, (x, dim, per_rank(local)), shape=shape, dtype=op.dtype, layout=layout)
    if not any(rest):
        return x
    # torch chooses the kernel by the length of `pad`, so zero widths stay in it
    return p.same(op, (x, rest, mode, value), layout=layout)


def slice_scatter(p: Partitioner, op: Op, x: fx.Node, source: fx.Node, dim: int = 0, *span: int) -> fx.Node:
    """Replaces every step-th row of a dim that is not split. Normal form writes step 1 as slices and `cat`."""
    if dim in (layout_of(x).dim, layout_of(source).dim):
        raise SplitError("it replaces strided rows along the split dim")
    shape = tuple(1 if d == dim else s for d, s in enumerate(op.shape))
    layout, (x, source) = align(p, shape, [x, source])
    return p.same(op, (x, source, dim, *span), layout=layout)


TABLE = {
    aten.slice.Tensor: OpSpec(slice_, form=forms.slice_, free=True, row_wise=row_rules.slice_),
    aten.flip.default: OpSpec(flip),
    aten.roll.default: OpSpec(roll, form=views.roll),
    aten.cat.default: OpSpec(cat, form=forms.cat, row_wise=row_rules.cat),
    aten.constant_pad_nd.default: OpSpec(constant_pad, form=forms.constant_pad),
    aten.pad.default: OpSpec(mirrored_pad, form=forms.pad),
    aten.slice_scatter.default: OpSpec(slice_scatter, form=forms.slice_scatter),
}
