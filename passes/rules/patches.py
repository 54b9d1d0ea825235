"""Patches of images as columns (`im2col`), sums of overlapping patches (`col2im`), and sampling at grid positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...ir import ops
from ...ir.layout import Layout, Rows, even, full, per_rank
from ...ir.operators import OpSpec
from ...ir.program import layout_of, shape_of
from ..partition import Op, Partitioner, SplitError
from .views import through
from .windows import Transposed, Window, halo, with_entry

aten = torch.ops.aten


def _positions(size: int, kernel: int, dilation: int, padding: int, stride: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def im2col(
    p: Partitioner, op: Op, x: fx.Node, kernel: list[int], dilation: list[int], padding: list[int], stride: list[int]
) -> fx.Node:
    """[B, C, H, W] -> [B, C * kernel, windows]."""
    layout, shape = layout_of(x), shape_of(x)
    if len(shape) != 4:
        raise SplitError("it has no batch dim")
    if layout.dim == 0:
        return p.same(op, (x, kernel, dilation, padding, stride), layout=layout)
    if layout.dim == 1:
        area = kernel[0] * kernel[1]
        rows = tuple(Rows.of([c * area + k for c in r.array for k in range(area)]) for r in layout.rows)
        return p.same(op, (x, kernel, dilation, padding, stride), layout=Layout(1, rows))
    i = layout.axis - 2
    grid = tuple(_positions(shape[2 + j], kernel[j], dilation[j], padding[j], stride[j]) for j in range(2))
    found = halo(p, x, Window(kernel[i], stride[i], padding[i], dilation[i]), grid[i])
    if found is None:
        x = p.whole(x, "small", f"fewer windows than ranks along dim {layout.dim}")
        return p.same(op, (x, kernel, dilation, padding, stride), layout=Layout())
    x, rows, _ = found
    count = grid[0] * grid[1]
    flat = through(grid, Layout(i, rows), (count,)) or Layout(0, full(count, p.world))  # None: all windows on each rank
    return p.same(op, (x, kernel, dilation, with_entry(padding, i, 0), stride), layout=flat.at(2))


def col2im(
    p: Partitioner, op: Op, x: fx.Node, size: list[int], kernel: list[int], dilation: list[int], padding: list[int],
    stride: list[int],
) -> fx.Node:  # fmt: skip
    """[B, C * kernel, windows] -> [B, C, H, W]: adds overlapping windows. Cuts run between rows of windows."""
    layout, shape = layout_of(x), shape_of(x)
    if len(shape) != 3:
        raise SplitError("it has no batch dim")
    if layout.dim == 0:
        return p.same(op, (x, size, kernel, dilation, padding, stride), layout=layout)
    if layout.dim == 1:
        raise SplitError("the channels are split")
    grid = tuple(_positions(size[j], kernel[j], dilation[j], padding[j], stride[j]) for j in range(2))
    if grid[0] < p.world or size[0] < p.world:
        x = p.whole(x, "small", "fewer rows of windows than ranks")
        return p.same(op, (x, size, kernel, dilation, padding, stride), layout=Layout())
    at = through((grid[0] * grid[1],), Layout(0, layout.rows), grid)
    if at is None or at.dim != 0:
        back = through(grid, Layout(0, even(grid[0], p.world)), (grid[0] * grid[1],))
        assert back is not None
        x = p.lay(x, back.at(2), "realign", "cuts run between rows of windows")
        at = Layout(0, even(grid[0], p.world))
    spread = (*shape[:2], *grid)
    x = p.emit(aten.reshape.default, (x, p.local(spread, at.at(2))), shape=spread, dtype=op.dtype, layout=at.at(2))
    window = Transposed(kernel[0], stride[0], padding[0], dilation[0])
    found = halo(p, x, window, size[0])
    assert found is not None
    x, rows, first = found
    heights = [(len(r) - 1) * stride[0] + dilation[0] * (kernel[0] - 1) + 1 for r in p.rows(x, 2)]
    columns = tuple(Rows.interval(r.start * grid[1], r.stop * grid[1]) for r in p.rows(x, 2))
    shape, at = (*shape[:2], shape_of(x)[2] * grid[1]), Layout(2, columns)
    x = p.emit(aten.reshape.default, (x, p.local(shape, at)), shape=shape, dtype=op.dtype, layout=at, holes=True)
    offsets = [lo * stride[0] - padding[0] for lo in first]
    mine = per_rank([r.shift(-o) for r, o in zip(rows, offsets, strict=True)])
    args = (op.target, 2, mine, x, [per_rank(heights), size[1]], kernel, dilation, with_entry(padding, 0, 0), stride)
    return p.emit(ops.rows_of, args, shape=op.shape, dtype=op.dtype, layout=Layout(2, rows))


def grid_sampler(p: Partitioner, op: Op, x: fx.Node, grid: fx.Node, *rest: Any) -> fx.Node:
    """`x` [B, C, …] sampled at `grid` [B, …, dims]. `x` is fetched whole, the positions are divided."""
    layout, at = layout_of(x), layout_of(grid)
    last = len(op.shape) - 1
    if 0 in (layout.dim, at.dim):
        layout = layout if layout.dim == 0 else at
        return p.same(op, (p.lay(x, layout), p.lay(grid, layout), *rest), layout=layout)
    if at.dim == last:
        grid = p.whole(grid, "realign", "the coordinates of a position are used together")
        at = layout_of(grid)
    if layout.dim == 1 and not at.split:
        return p.same(op, (x, grid, *rest), layout=layout)
    x = p.whole(x, "realign", "any position may be sampled")
    if not at.split and op.shape[2] >= p.world:
        at = Layout(1, even(op.shape[2], p.world))
        grid = p.take(grid, 1, at.rows)
    return p.same(op, (x, grid, *rest), layout=at.at(at.axis + 1) if at.split else at)


TABLE = {
    aten.im2col.default: OpSpec(im2col),
    aten.col2im.default: OpSpec(col2im),
    aten.grid_sampler.default: OpSpec(grid_sampler),
    aten.grid_sampler_2d.default: OpSpec(grid_sampler),
    aten.grid_sampler_3d.default: OpSpec(grid_sampler),
}
