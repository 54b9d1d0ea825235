"""Look-ups: embedding, advanced indexing, gather.

If the indices are split, each rank looks up its own in the whole table. If a table dim that is not indexed is split,
the result stays split along it. If the indexed dim is split, the table is fetched whole, and the look-ups are divided.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from ...capture import row_rules, rows
from ...ir.layout import Layout, Rows, even
from ...ir.operators import OpSpec
from ...ir.program import layout_of, shape_of
from ..partition import Op, Partitioner
from .pointwise import align
from .slicing import cut

aten = torch.ops.aten


ANY = "any row may be looked up"


def share(p: Partitioner, rows: tuple[Rows, ...], size: int) -> tuple[Rows, ...] | None:
    """How the ranks divide `size` look-ups in a dim that was cut into `rows`; None if there are too few."""
    if max(r.stop for r in rows) == size:
        return rows
    return even(size, p.world) if size >= p.world else None


def embedding(p: Partitioner, op: Op, table: fx.Node, indices: fx.Node, *rest: object) -> fx.Node:
    layout = layout_of(table)
    if layout.dim == 1 and not layout_of(indices).split:
        return p.same(op, (table, indices, *rest), layout=layout.at(len(op.shape) - 1))
    return p.same(op, (p.whole(table, "realign", ANY), indices, *rest), layout=layout_of(indices))


def index_select(p: Partitioner, op: Op, x: fx.Node, dim: int, indices: fx.Node) -> fx.Node:
    layout, at, dim = layout_of(x), layout_of(indices), dim % len(op.shape)
    if layout.dim == dim:
        rows = at.rows if at.split else share(p, layout.rows, op.shape[dim])
        x = p.whole(x, "realign", ANY)
        if rows is None:
            return p.same(op, (x, dim, indices), layout=Layout())
        return p.same(op, (x, dim, p.take(indices, 0, rows)), layout=Layout(dim, rows))
    if layout.split:
        return p.same(op, (x, dim, p.whole(indices, "realign")), layout=layout)
    return p.same(op, (x, dim, indices), layout=at.at(dim))


def index(p: Partitioner, op: Op, x: fx.Node, indices: list[fx.Node | None]) -> fx.Node:
    """`x[i, :, j]` with integer tensors that broadcast. Capture replaces boolean ones by positions."""
    used = [d for d, i in enumerate(indices) if i is not None]
    given = [i for i in indices if i is not None]
    assert all(i.meta["dtype"] != torch.bool for i in given)
    layout = layout_of(x)
    adjacent = used == list(range(used[0], used[-1] + 1))
    broadcast = torch.broadcast_shapes(*(shape_of(i) for i in given))
    start = used[0] if adjacent else 0
    if layout.dim in used:
        x = p.whole(x, "realign", ANY)
        if not any(layout_of(i).split for i in given):
            result = p.same(op, (x, indices), layout=Layout())
            rows = share(p, layout.rows, broadcast[0]) if broadcast else None
            return result if rows is None else p.take(result, start, rows)
    elif layout.dim is not None:
        indices = [p.whole(i, "realign") if i is not None else None for i in indices]
        other_dims = [d for d in range(len(shape_of(x))) if d not in used]
        place = other_dims.index(layout.dim)
        return p.same(op, (x, indices), layout=layout.at(place + (len(broadcast) if place >= start else 0)))
    cut, given = align(p, tuple(broadcast), given)
    supply = iter(given)
    indices = [next(supply) if i is not None else None for i in indices]
    return p.same(op, (x, indices), layout=cut.at(cut.axis + start))


def gather(p: Partitioner, op: Op, x: fx.Node, dim: int, indices: fx.Node, **kwargs: object) -> fx.Node:
    dim = dim % len(op.shape)
    for d, size in enumerate(op.shape):
        if d != dim and shape_of(x)[d] != size:  # `gather` ignores the rows beyond the index's size
            x = shortened(p, x, d, size)
    layout = layout_of(indices) if layout_of(indices).split else layout_of(x)
    if layout.dim == dim:
        rows = layout.rows if layout_of(indices).split else share(p, layout.rows, op.shape[dim])
        x = p.whole(x, "realign", ANY)
        layout = Layout() if rows is None else Layout(dim, rows)
    elif layout.split:
        x = p.lay(x, layout, "realign", "operands cut differently")
    indices = p.lay(indices, layout, "realign", "operands cut differently")
    return p.same(op, (x, dim, indices), kwargs, layout=layout)


def shortened(p: Partitioner, x: fx.Node, dim: int, size: int) -> fx.Node:
    """The first `size` rows of `x`."""
    if layout_of(x).split:
        return cut(p, x, dim, 0, size)
    shape = (*shape_of(x)[:dim], size, *shape_of(x)[dim + 1 :])
    return p.emit(aten.slice.Tensor, (x, dim, 0, size), shape=shape, dtype=x.meta["dtype"])


def one_hot(p: Partitioner, op: Op, indices: fx.Node, classes: int = -1) -> fx.Node:
    """Adds a dim at the end."""
    return p.same(op, (indices, classes), layout=layout_of(indices))


def made_from_shape(p: Partitioner, op: Op, x: fx.Node, *rest: object, **kwargs: object) -> fx.Node:
    """`new_zeros`, `new_ones` and so on use only the dtype and the device of `x`."""
    return p.same(op, (x, *rest), kwargs, layout=Layout())


def _embedding_indices(x: fx.Node, wanted: Layout) -> Iterator[dict[fx.Node, Layout]]:
    indices = x.args[1]
    assert isinstance(indices, fx.Node)
    if wanted.axis < len(shape_of(indices)):  # otherwise columns of the table are wanted
        yield {indices: wanted}


TABLE = {
    aten.embedding.default: OpSpec(embedding, pull_back=_embedding_indices),
    aten.index_select.default: OpSpec(index_select, row_wise=rows.index_select),
    aten.index.Tensor: OpSpec(index, row_wise=rows.index),
    aten.gather.default: OpSpec(gather),
    aten.one_hot.default: OpSpec(one_hot),
    aten.new_zeros.default: OpSpec(made_from_shape, row_wise=row_rules.new),
    aten.new_ones.default: OpSpec(made_from_shape, row_wise=row_rules.new),
    aten.new_full.default: OpSpec(made_from_shape, row_wise=row_rules.new),
    aten.new_empty.default: OpSpec(made_from_shape, row_wise=row_rules.new),
}
