"""Frames of signals: sliding windows (`unfold`), short-time Fourier transforms, and Fourier transforms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from ...ir.layout import Layout
from ...ir.operators import OpSpec
from ...ir.program import layout_of, shape_of
from ..partition import Op, Partitioner, SplitError
from .windows import Window, halo

aten = torch.ops.aten


def unfold(p: Partitioner, op: Op, x: fx.Node, dim: int, size: int, step: int) -> fx.Node:
    """`x.unfold(dim, size, step)`: each window is a row of the result; its elements are a new last dim."""
    layout, dim = layout_of(x), dim % len(shape_of(x))
    if layout.dim != dim:
        return p.same(op, (x, dim, size, step), layout=layout)
    x, layout = _framed(p, op, x, Window(size, step, 0, 1), dim)
    return p.same(op, (x, dim, size, step), layout=layout)


def stft(
    p: Partitioner,
    op: Op,
    x: fx.Node,
    size: int,
    hop: int | None = None,
    width: int | None = None,
    window: fx.Node | None = None,
    normalized: bool = False,
    onesided: bool | None = None,
    return_complex: bool | None = None,
    align_to_window: bool | None = None,
) -> fx.Node:
    """Samples [B, N] -> [B, K, F]: K frequencies of F frames."""
    layout = layout_of(x)
    if align_to_window:
        raise SplitError("align_to_window is set")
    window = p.whole(window, "realign") if window is not None else None
    if layout.split and layout.axis == len(shape_of(x)) - 1:
        frames = len(op.shape) - (1 if return_complex else 2)
        x, layout = _framed(p, op, x, Window(size, hop or size // 4, 0, 1), frames)
    return p.same(op, (x, size, hop, width, window, normalized, onesided, return_complex), layout=layout)


def _framed(p: Partitioner, op: Op, x: fx.Node, window: Window, frames: int) -> tuple[fx.Node, Layout]:
    """Fetch the samples that each rank's frames read: (samples, layout of the frames in the result)."""
    found = halo(p, x, window, op.shape[frames])
    if found is None:
        return p.whole(x, "small", "fewer frames than ranks"), Layout()
    x, rows, _ = found
    return x, Layout(frames, rows)


def fourier(p: Partitioner, op: Op, x: fx.Node, dims: Sequence[int], *rest: object) -> fx.Node:
    layout = layout_of(x)
    if layout.axis in [d % len(op.shape) for d in dims]:
        raise SplitError(f"it transforms the split dim {layout.dim}")
    return p.same(op, (x, dims, *rest), layout=layout)


TABLE = {
    aten.unfold.default: OpSpec(unfold),
    aten.stft.default: OpSpec(stft),
    aten._fft_r2c.default: OpSpec(fourier),
    aten._fft_c2r.default: OpSpec(fourier),
    aten._fft_c2c.default: OpSpec(fourier),
}
