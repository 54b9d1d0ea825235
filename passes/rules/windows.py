"""Operators whose output rows each read a window of input rows: convolutions and pooling, in one to three dims.

The rank that holds the centre of a window computes its output row. It fetches the rows that it lacks (role `halo`);
zero padding at the border of the image is part of the same copy::

    own rows           . . . a b c d . . .
    windows reach    . . p a b c d q . . .        fetch(p, q), then convolve without padding along this dim
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod
from typing import Any

import numpy as np
import torch
from torch import fx

from ...ir import ops
from ...ir.layout import Layout, Rows, per_rank
from ...ir.operators import OpSpec
from ...ir.program import layout_of, shape_of
from ..forms import windows as forms
from ..partition import Op, Partitioner, SplitError

aten = torch.ops.aten
Shape = Sequence[int]


@dataclass(frozen=True)
class Window:
    """Along one dim: output row o reads input rows o*stride - padding + dilation*(0 … size-1)."""

    size: int
    stride: int
    padding: int
    dilation: int

    @property
    def trivial(self) -> bool:
        return self.size == 1 and self.stride == 1 and self.padding == 0

    def centres(self, outputs: int) -> np.ndarray:
        return np.arange(outputs) * self.stride - self.padding + (self.size - 1) * self.dilation // 2

    def reach(self, rows: Rows) -> tuple[int, int]:
        """The input rows [lo, hi) that the output `rows` read. Rows outside the input are padding."""
        lo = rows.start * self.stride - self.padding
        return lo, (rows.stop - 1) * self.stride - self.padding + (self.size - 1) * self.dilation + 1


@dataclass(frozen=True)
class Transposed(Window):
    """The adjoint: input row i adds to output rows i*stride - padding + dilation*(0 … size-1)."""

    def centres(self, outputs: int) -> np.ndarray:
        return (np.arange(outputs) + self.padding - (self.size - 1) * self.dilation // 2) // self.stride

    def reach(self, rows: Rows) -> tuple[int, int]:
        span = (self.size - 1) * self.dilation
        lo = -((span - rows.start - self.padding) // self.stride)
        hi = (rows.stop - 1 + self.padding) // self.stride + 1
        # a kernel shorter than the stride leaves gaps between rows: include the rows on both sides
        return min(lo, (rows.start + self.padding) // self.stride), hi + (span < self.stride - 1)


@lru_cache(maxsize=4096)
def _centred(window: Window, outputs: int, size: int, rows: tuple[Rows, ...]) -> tuple[Rows, ...]:
    """The output rows of each rank: those with the centre of their window among the rank's input rows."""
    centres = np.clip(window.centres(outputs), 0, size - 1)
    return tuple(Rows.of(np.flatnonzero(np.isin(centres, each.array))) for each in rows)


def halo(
    p: Partitioner, x: fx.Node, window: Window, outputs: int, fill: float = 0.0
) -> tuple[fx.Node, tuple[Rows, ...], tuple[int, ...]] | None:
    """Fetch what each rank's windows read: (x with halo, output rows of each rank, position of its first input row).

    None if there are fewer output rows than ranks.
    """
    layout = layout_of(x)
    dim = layout.axis
    size = shape_of(x)[dim]
    rows = p.spread(_centred(window, outputs, size, layout.rows), outputs, contiguous=True)
    if rows is None:
        return None
    reach = [window.reach(r) for r in rows]
    if isinstance(window, Transposed):  # the last output rows may be padding alone; `ops.rows_of` takes no others
        reach = [(min(lo, size - 1), hi) for lo, hi in reach]
    want = tuple(Rows.interval(max(lo, 0), min(hi, size)) for lo, hi in reach)
    if not all(w.runs for w in want):
        raise SplitError("the windows of one rank would read nothing but padding")
    x = p.fetch(
        x,
        dim,
        want,
        "halo",
        before=tuple(max(0, -lo) for lo, _ in reach),
        after=tuple(max(0, hi - size) for _, hi in reach),
        fill=fill,
        may_be_stale=True,
    )
    return x, rows, tuple(lo for lo, _ in reach)


def with_entry(values: Sequence[Any], i: int, value: Any) -> list[Any]:
    """`values` with `value` at place `i`."""
    return [value if j == i else v for j, v in enumerate(values)]


def convolution(
    p: Partitioner,
    op: Op,
    x: fx.Node,
    weight: fx.Node,
    bias: fx.Node | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    channel_groups: int,
) -> fx.Node:
    layout = layout_of(x)
    if layout.dim is None:
        raise SplitError("the weight of a convolution is split")
    weight = p.whole(weight, "realign", "convolution weights are used whole")
    bias = p.whole(bias, "realign", "convolution weights are used whole") if bias is not None else None
    geometry = (stride, padding, dilation, transposed, output_padding, channel_groups)
    if layout.dim == 0:
        return p.same(op, (x, weight, bias, *geometry), layout=layout)
    if layout.dim == 1:
        raise SplitError("the channels are split")
    dim, i = layout.axis, layout.axis - 2
    kind = Transposed if transposed else Window
    window = kind(shape_of(weight)[dim], stride[i], padding[i], dilation[i])
    if window.trivial and op.shape[dim] == shape_of(x)[dim]:
        return p.same(op, (x, weight, bias, *geometry), layout=layout)
    found = halo(p, x, window, op.shape[dim])
    if found is None:
        x = p.whole(x, "small", f"fewer rows than ranks along dim {dim}")
        return p.same(op, (x, weight, bias, *geometry), layout=Layout())
    x, rows, first = found
    args = (
        x,
        weight,
        bias,
        stride,
        with_entry(padding, i, 0),
        dilation,
        transposed,
        with_entry(output_padding, i, 0),
        channel_groups,
    )
    if not transposed:
        return p.same(op, args, layout=Layout(dim, rows))
    # take the rows of this rank: others lack what the input rows of other ranks add
    offsets = [lo * window.stride - window.padding for lo in first]
    mine = per_rank([r.shift(-o) for r, o in zip(rows, offsets, strict=True)])
    return p.emit(ops.rows_of, (op.target, dim, mine, *args), shape=op.shape, dtype=op.dtype, layout=Layout(dim, rows))


def _pool(
    p: Partitioner, op: Op, x: fx.Node, size: list[int], stride: list[int], padding: list[int], dilation: list[int],
    fill: float, rebuild: Any,
) -> fx.Node:  # fmt: skip
    layout, spatial = layout_of(x), len(size)
    i = layout.axis - (len(op.shape) - spatial)
    if i < 0:
        return p.same(op, rebuild(x, padding), layout=layout)
    found = halo(p, x, Window(size[i], stride[i], padding[i], dilation[i]), op.shape[layout.axis], fill)
    if found is None:
        x = p.whole(x, "small", f"fewer rows than ranks along dim {layout.axis}")
        return p.same(op, rebuild(x, padding), layout=Layout())
    x, rows, _ = found
    return p.same(op, rebuild(x, with_entry(padding, i, 0)), layout=Layout(layout.axis, rows))


def _each(value: Any, spatial: int, default: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value or [default])
    return values * spatial if len(values) == 1 else values


def max_pool(
    spatial: int, p: Partitioner, op: Op, x: fx.Node, size: list[int], stride: Any = (), padding: Any = 0,
    dilation: Any = 1, ceil_mode: bool = False,
) -> fx.Node:  # fmt: skip
    sizes = _each(size, spatial, 1)
    strides = _each(stride, spatial, 1) if stride else sizes
    dilations = _each(dilation, spatial, 1)
    return _pool(
        p, op, x, sizes, strides, _each(padding, spatial, 0), dilations, float("-inf"),
        lambda x, padding: (x, sizes, strides, padding, dilations, ceil_mode),
    )  # fmt: skip


def avg_pool(
    spatial: int, p: Partitioner, op: Op, x: fx.Node, size: list[int], stride: Any = (), padding: Any = 0,
    ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None,
) -> fx.Node:  # fmt: skip
    sizes = _each(size, spatial, 1)
    strides = _each(stride, spatial, 1) if stride else sizes
    paddings = _each(padding, spatial, 0)
    i = layout_of(x).axis - (len(op.shape) - spatial)
    if i >= 0 and divisor_override is None:
        left = (shape_of(x)[layout_of(x).axis] + 2 * paddings[i] - sizes[i]) % strides[i]
        if (ceil_mode and left) or (paddings[i] and not count_include_pad):
            raise SplitError("it averages windows of different sizes at the border")
    rest = (divisor_override,) if spatial > 1 else ()
    return _pool(
        p, op, x, sizes, strides, paddings, [1] * spatial, 0.0,
        lambda x, padding: (x, sizes, strides, padding, ceil_mode, count_include_pad, *rest),
    )  # fmt: skip


def adaptive_max(p: Partitioner, op: Op, *_: Any) -> fx.Node:
    raise SplitError("the positions of the maxima are used")


def _flops(out: Shape, x: Shape, weight: Shape, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
           *_: Any) -> int:  # fmt: skip
    positions = prod(x[2:]) * x[0] * x[1] if transposed else prod(out)
    return 2 * positions * prod(weight[1:])


TABLE = {
    aten.convolution.default: OpSpec(convolution, flops=_flops),
    aten.adaptive_max_pool1d.default: OpSpec(adaptive_max, form=forms.adaptive_max),
    aten.adaptive_max_pool2d.default: OpSpec(adaptive_max, form=forms.adaptive_max),
    aten.adaptive_max_pool3d.default: OpSpec(adaptive_max, form=forms.adaptive_max),
    aten.max_pool1d.default: OpSpec(partial(max_pool, 1)),
    aten.max_pool2d.default: OpSpec(partial(max_pool, 2)),
    aten.max_pool3d.default: OpSpec(partial(max_pool, 3)),
    aten.avg_pool1d.default: OpSpec(partial(avg_pool, 1)),
    aten.avg_pool2d.default: OpSpec(partial(avg_pool, 2)),
    aten.avg_pool3d.default: OpSpec(partial(avg_pool, 3)),
}
