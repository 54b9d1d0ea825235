"""Writes at computed positions: scatter, index_add, index_put. The target is split, indices and sources are whole.

Each rank writes into its own rows; a scratch row absorbs writes to other ranks' rows (`ops.write_rows`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...capture import row_writes
from ...ir import ops
from ...ir.layout import Layout, even, per_rank
from ...ir.operators import OpSpec
from ...ir.program import layout_of, shape_of
from ..forms import copies
from ..partition import Op, Partitioner, Rule, SplitError
from .pointwise import broadcast_to

aten = torch.ops.aten
ANY = "any row may be written"


def own_rows(p: Partitioner, x: fx.Node, dim: int) -> fx.Node:
    """`x` split along `dim`: as it is if it is split there, else evenly."""
    if layout_of(x).dim == dim:
        return x
    if shape_of(x)[dim] < p.world:
        raise SplitError(f"fewer rows than ranks along dim {dim}")
    return p.lay(x, Layout(dim, even(shape_of(x)[dim], p.world)), "realign", ANY)


def write(aligned: bool) -> Rule:
    """Operators of (x, dim, index, source, …). `aligned`: the index has all dims of the source, not only one."""

    def rule(
        p: Partitioner, op: Op, x: fx.Node, dim: int, index: fx.Node, source: Any, *rest: Any, **kwargs: Any
    ) -> Any:
        ndim = len(op.shape)
        dim = dim % ndim
        sources = [t for t in (index, source) if isinstance(t, fx.Node) and len(shape_of(t)) == ndim]
        layout = next((layout_of(t) for t in (x, *sources) if layout_of(t).split), Layout())
        together = layout.split and layout.dim != dim and (sources or aligned)
        if together and all(shape_of(t)[layout.axis] == op.shape[layout.axis] for t in sources):
            x, source = (p.lay(t, layout) if t is x or t in sources else t for t in (x, source))
            index = p.lay(index, layout) if aligned else p.whole(index, "realign", ANY)
            return p.same(op, (x, dim, index, source, *rest), kwargs, layout=layout)
        if together and layout_of(x).split:
            x = p.whole(x, "realign", ANY)  # the index covers the first rows only
        x, index = own_rows(p, x, dim), p.whole(index, "realign", ANY)
        source = p.whole(source, "realign", ANY) if isinstance(source, fx.Node) else source
        layout = layout_of(x)
        args = (op.target, per_rank(layout.rows), op.shape[dim], x, dim, index, source, *rest)
        return p.emit(ops.write_rows, args, kwargs, shape=op.shape, dtype=op.dtype, layout=layout)

    return rule


def index_put(
    p: Partitioner, op: Op, x: fx.Node, indices: list[fx.Node | None], values: fx.Node, accumulate: bool = False
) -> fx.Node:
    used = [d for d, i in enumerate(indices) if i is not None]
    given = [i for i in indices if i is not None]
    if any(i.meta["dtype"] == torch.bool for i in given):
        raise SplitError("its index is boolean")
    indices = [p.whole(i, "realign", ANY) if i is not None else None for i in indices]
    layout = layout_of(x)
    if layout.split and layout.dim not in used:
        broadcast = torch.broadcast_shapes(*(shape_of(i) for i in given))
        adjacent = used == list(range(used[0], used[-1] + 1))
        other_dims = [d for d in range(len(op.shape)) if d not in used]
        place, start = other_dims.index(layout.axis), used[0] if adjacent else 0
        at = layout.at(place + (len(broadcast) if place >= start else 0))
        values = broadcast_to(p, values, at, len(broadcast) + len(other_dims))
        return p.same(op, (x, indices, values, accumulate), layout=layout)
    values = p.whole(values, "realign", ANY)
    dim = layout.dim if layout.split else next((d for d in used if op.shape[d] >= p.world), None)
    if dim is None:  # too few rows to split: every rank writes all
        return p.same(op, (x, indices, values, accumulate), layout=layout)
    x = own_rows(p, x, dim)
    layout = layout_of(x)
    args = (per_rank(layout.rows), op.shape[dim], dim, x, indices, values, accumulate)
    return p.emit(ops.put_rows, args, shape=op.shape, dtype=op.dtype, layout=layout)


TABLE = {
    aten.scatter.src: OpSpec(write(aligned=True)),
    aten.scatter.value: OpSpec(write(aligned=True)),
    aten.scatter.reduce: OpSpec(write(aligned=True)),
    aten.scatter.value_reduce: OpSpec(write(aligned=True)),
    aten.scatter_add.default: OpSpec(write(aligned=True), row_wise=row_writes.add_rows),
    aten.scatter_reduce.two: OpSpec(write(aligned=True), row_wise=row_writes.add_rows),
    aten.index_add.default: OpSpec(write(aligned=False), row_wise=row_writes.add_rows),
    aten.index_copy.default: OpSpec(write(aligned=False)),
    aten.index_fill.int_Scalar: OpSpec(write(aligned=False)),
    aten.index_put.default: OpSpec(index_put, form=copies.index_put, row_wise=row_writes.put_rows),
}
