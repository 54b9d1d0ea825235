"""Look-ups: embedding, advanced indexing, gather. Split indices look up whole tables; a split table dim that is not
indexed stays split."""

from __future__ import annotations

import torch
from torch import fx

from ...ir.layout import Layout
from ...ir.program import layout_of, shape_of
from ..partition import Op, Partitioner, SplitError
from .pointwise import align

aten = torch.ops.aten


def embedding(p: Partitioner, op: Op, table: fx.Node, indices: fx.Node, *rest: object) -> fx.Node:
    if layout_of(table).split:
        raise SplitError("the table is split")
    return p.same(op, (table, indices, *rest), layout=layout_of(indices))


def index_select(p: Partitioner, op: Op, x: fx.Node, dim: int, indices: fx.Node) -> fx.Node:
    layout, at = layout_of(x), layout_of(indices)
    if layout.dim == dim % len(op.shape):
        raise SplitError("looks up along the split dim")
    if layout.split:
        return p.same(op, (x, dim, p.whole(indices, "realign")), layout=layout)
    return p.same(op, (x, dim, indices), layout=at.at(dim % len(op.shape)))


def index(p: Partitioner, op: Op, x: fx.Node, indices: list[fx.Node | None]) -> fx.Node:
    """`x[i, :, j]` with integer tensors that broadcast; boolean ones have data-dependent sizes."""
    used = [d for d, i in enumerate(indices) if i is not None]
    given = [i for i in indices if i is not None]
    if any(i.meta["dtype"] == torch.bool for i in given):
        raise SplitError("a boolean index")
    layout = layout_of(x)
    if layout.dim in used:
        raise SplitError("looks up along the split dim")
    adjacent = used == list(range(used[0], used[-1] + 1))
    broadcast = torch.broadcast_shapes(*(shape_of(i) for i in given))
    start = used[0] if adjacent else 0
    if layout.dim is not None:
        indices = [p.whole(i, "realign") if i is not None else None for i in indices]
        kept = [d for d in range(len(shape_of(x))) if d not in used]
        place = kept.index(layout.dim)
        return p.same(op, (x, indices), layout=layout.at(place + (len(broadcast) if place >= start else 0)))
    cut, given = align(p, tuple(broadcast), given)
    supply = iter(given)
    indices = [next(supply) if i is not None else None for i in indices]
    return p.same(op, (x, indices), layout=cut.at(cut.axis + start))


def gather(p: Partitioner, op: Op, x: fx.Node, dim: int, indices: fx.Node, **kwargs: object) -> fx.Node:
    dim = dim % len(op.shape)
    layout = layout_of(indices) if layout_of(indices).split else layout_of(x)
    if layout_of(x).dim == dim:
        raise SplitError("looks up along the split dim")
    if layout.dim != dim:
        if shape_of(x)[layout.axis] != op.shape[layout.axis]:
            raise SplitError("index and source differ in size along the split dim")
        x = p.lay(x, layout)
    else:
        x = p.whole(x, "realign", "looked up by split indices")
    return p.same(op, (x, dim, p.lay(indices, layout)), kwargs, layout=layout)


def one_hot(p: Partitioner, op: Op, indices: fx.Node, classes: int = -1) -> fx.Node:
    """A new last dim."""
    return p.same(op, (indices, classes), layout=layout_of(indices))


def made_from_shape(p: Partitioner, op: Op, x: fx.Node, *rest: object, **kwargs: object) -> fx.Node:
    """`new_zeros` and its like: `x` gives dtype and device only."""
    return p.same(op, (x, *rest), kwargs, layout=Layout())


TABLE = {
    aten.embedding.default: embedding,
    aten.index_select.default: index_select,
    aten.index.Tensor: index,
    aten.gather.default: gather,
    aten.one_hot.default: one_hot,
    aten.new_zeros.default: made_from_shape,
    aten.new_ones.default: made_from_shape,
    aten.new_full.default: made_from_shape,
    aten.new_empty.default: made_from_shape,
}
