"""Views: reshape, permute and expand keep a split dim split wherever law 1 allows it.

`groups` divides a reshape into minimal groups of dims with equal products. In the group of the split dim, the rank's
flat positions are enumerated and unravelled on the output dims. The result is split along the one output dim of which
the rank does not have all positions. This covers flattening frames x rows x columns to tokens, heads, 2x2 packing and
unpacking, and window attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import takewhile
from math import prod

import numpy as np
import torch
from torch import fx

from ...capture import row_rules
from ...ir import ops
from ...ir.layout import Layout, Rows, even, per_rank
from ...ir.operators import OpSpec
from ...ir.program import layout_of, shape_of
from ..forms import views as forms
from ..partition import Op, Partitioner, SplitError

aten = torch.ops.aten


def groups(source: tuple[int, ...], target: tuple[int, ...]) -> list[tuple[range, range]]:
    """Minimal groups of dims with equal products: [2, 6, 4] -> [2, 3, 8] gives (0|0), (1,2|1,2).

    Of shapes without elements, the equal dims at their beginning, and all others together.

    Raises `AssertionError` if the shapes have unlike numbers of elements.
    """
    if 0 in source and 0 in target:
        same = len([*takewhile(lambda pair: pair[0] == pair[1], zip(source, target, strict=False))])
        rest = range(same, len(source)), range(same, len(target))
        return [(range(k, k + 1), range(k, k + 1)) for k in range(same)] + ([rest] if any(map(len, rest)) else [])
    result = []
    i = j = 0
    while i < len(source) or j < len(target):
        first_i, first_j = i, j
        a = b = 1
        while True:
            if a <= b and i < len(source) and (a < b or i == first_i):
                a *= source[i]
                i += 1
            elif j < len(target) and (b < a or j == first_j):
                b *= target[j]
                j += 1
            elif a == b:
                break
            else:
                raise AssertionError(f"a reshape keeps the number of elements: {source} -> {target}")
        result.append((range(first_i, i), range(first_j, j)))
    return result


@lru_cache(maxsize=1 << 14)
def unravel(source: tuple[int, ...], dim: int, rows: Rows, target: tuple[int, ...]) -> tuple[int, Rows] | None:
    """The (dim, rows) in the group `target` of `rows` of dim `dim` in the group `source`, or None.

    The dim is -1 if all positions of all dims are there.
    """
    outer, inner = prod(source[:dim]), prod(source[dim + 1 :])
    block = rows.array[:, None] * inner + np.arange(inner)
    flat = (np.arange(outer)[:, None, None] * (source[dim] * inner) + block).reshape(-1)
    found = -1, Rows.interval(0, 1)
    count = 1
    for axis, size in enumerate(target):
        below = prod(target[axis + 1 :])
        seen = np.unique(flat // below % size)
        count *= len(seen)
        if len(seen) < size:
            if found[0] >= 0:
                return None
            found = axis, Rows.of(seen)
    return found if count == len(flat) else None


def through(source: tuple[int, ...], layout: Layout, target: tuple[int, ...]) -> Layout | None:
    """The layout after a reshape, or None if the ranks' parts are not split along one dim."""
    ins, outs = next(g for g in groups(source, target) if layout.axis in g[0])
    part, result = tuple(source[i] for i in ins), tuple(target[j] for j in outs)
    dim = layout.axis - ins.start
    found = [unravel(part, dim, rows, result) for rows in layout.rows]
    if any(f is None for f in found):
        return None
    dims = {f[0] for f in found if f is not None} - {-1}
    if len(dims) != 1:
        return None
    (axis,) = dims
    everything = Rows.interval(0, result[axis])
    return Layout(outs.start + axis, tuple(everything if f[0] < 0 else f[1] for f in found if f is not None))


def reshape(p: Partitioner, op: Op, x: fx.Node, shape: list[int]) -> fx.Node:
    layout = through(shape_of(x), layout_of(x), op.shape)
    if layout is None:
        moved = _realign(p, x, op.shape)
        if moved is None:
            return _regroup(p, op, x)
        x, layout = moved
    return p.same(op, (x, p.local(op.shape, layout)), layout=layout)


def _realign(p: Partitioner, x: fx.Node, target: tuple[int, ...]) -> tuple[fx.Node, Layout] | None:
    """Move the cuts of `x` so that the result is split evenly along an output dim; None if no dim allows it."""
    source, layout = shape_of(x), layout_of(x)
    _, outs = next(g for g in groups(source, target) if layout.axis in g[0])
    for axis in sorted(outs, key=lambda j: -target[j]):
        if target[axis] < p.world:
            continue
        wanted = Layout(axis, even(target[axis], p.world))
        back = through(target, wanted, source)
        if back is not None and back.dim == layout.dim:
            reason = f"cuts of {list(source)} do not go through to {list(target)}"
            return p.lay(x, back, "realign", reason), wanted
    return None


def _regroup(p: Partitioner, op: Op, x: fx.Node) -> fx.Node:
    """A reshape that no cut goes through, because rows get another length: [2n-1, n] -> [n, 2n-1].

    If the split dim is the outermost of its group, an output row is an interval of the group's flat elements, and lies
    within a window of input rows. Each rank fetches the windows of its output rows (role `halo`).
    """
    source, layout = shape_of(x), layout_of(x)
    ins, outs = next(g for g in groups(source, op.shape) if layout.axis in g[0])
    dim = next((j for j in outs if op.shape[j] > 1), outs.start)
    if prod(source[ins.start : layout.axis]) > 1 or op.shape[dim] < p.world:
        raise SplitError(f"{list(source)} -> {list(op.shape)} mixes the split dim {layout.dim} with others")
    before, after = prod(source[layout.axis + 1 : ins.stop]), prod(op.shape[dim + 1 : outs.stop])  #: elements in a row
    firsts = np.arange(op.shape[dim]) * after // before
    rows = tuple(Rows.of(np.flatnonzero(np.isin(firsts, mine.array))) for mine in layout.rows)
    rows = p.spread(rows, op.shape[dim], contiguous=True)
    assert rows is not None
    want = tuple(Rows.interval(r.start * after // before, -(-r.stop * after // before)) for r in rows)
    x = p.fetch(x, layout.axis, want, "halo", may_be_stale=True)
    skipped = per_rank([r.start * after - w.start * before for r, w in zip(rows, p.rows(x, layout.axis), strict=True)])
    result = Layout(dim, rows)
    args = (x, ins.start, ins.stop, skipped, p.local(op.shape, result))
    return p.emit(ops.regroup, args, shape=op.shape, dtype=op.dtype, layout=result)


def permute(p: Partitioner, op: Op, x: fx.Node, dims: list[int]) -> fx.Node:
    layout = layout_of(x)
    return p.same(op, (x, dims), layout=layout.at(list(dims).index(layout.axis)))


def expand(p: Partitioner, op: Op, x: fx.Node, shape: list[int]) -> fx.Node:
    layout = layout_of(x)
    layout = layout.at(layout.axis + len(op.shape) - len(shape_of(x)))
    return p.same(op, (x, p.local(op.shape, layout)), layout=layout)


def last_dim_pair(p: Partitioner, op: Op, x: fx.Node) -> fx.Node:
    """`view_as_complex` and `view_as_real`: they remove or add the last dim."""
    layout = layout_of(x)
    if op.target is aten.view_as_complex.default and layout.axis == len(shape_of(x)) - 1:
        raise SplitError("the (real, imaginary) dim is split")
    return p.same(op, (x,), layout=layout)


# -- which rows of the operands may give the wanted rows of the result (trim) ----------------------------------------


def _reshaped(x: fx.Node, wanted: Layout) -> Iterator[dict[fx.Node, Layout]]:
    (operand,) = x.all_input_nodes
    back = through(shape_of(x), wanted, shape_of(operand))
    if back is not None:
        yield {operand: back}


def _permuted(x: fx.Node, wanted: Layout) -> Iterator[dict[fx.Node, Layout]]:
    operand, dims = x.args
    yield {operand: wanted.at(dims[wanted.axis])}  # type: ignore[dict-item, index, arg-type]


def _expanded(x: fx.Node, wanted: Layout) -> Iterator[dict[fx.Node, Layout]]:
    (operand,) = x.all_input_nodes
    dim = wanted.axis - (len(shape_of(x)) - len(shape_of(operand)))
    has_rows = dim >= 0 and shape_of(operand)[dim] == shape_of(x)[wanted.axis]
    yield {operand: wanted.at(dim)} if has_rows else {}


TABLE = {
    aten.reshape.default: OpSpec(
        reshape, form=forms.to_result_shape, free=True, pull_back=_reshaped, row_wise=row_rules.reshape
    ),
    aten.permute.default: OpSpec(
        permute, form=forms.permute, free=True, pull_back=_permuted, row_wise=row_rules.permute
    ),
    aten.expand.default: OpSpec(expand, form=forms.expand, free=True, pull_back=_expanded, row_wise=row_rules.expand),
    aten.view_as_complex.default: OpSpec(last_dim_pair, dense=True),
    aten.view.dtype: OpSpec(dense=True),
    aten.view_as_real.default: OpSpec(last_dim_pair, dense=True),
}
