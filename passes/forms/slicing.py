"""Cuts, joints and padding: all are `slice`, `cat` and `pad`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ...ir.program import shape_of
from ..builder import Builder, Form

aten = torch.ops.aten


def _slice(
    b: Builder, node: fx.Node, x: fx.Node, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> fx.Node:
    dim = dim % len(shape_of(x))
    return b.slice(x, dim, *slice(start, end, step).indices(shape_of(x)[dim]))


def _select(b: Builder, node: fx.Node, x: fx.Node, dim: int, index: int) -> fx.Node:
    dim = dim % len(shape_of(x))
    index = index % shape_of(x)[dim]
    return b.reshape(b.slice(x, dim, index, index + 1), shape_of(node))


def _unbind(b: Builder, node: fx.Node, x: fx.Node, dim: int = 0) -> tuple[fx.Node, ...]:
    dim = dim % len(shape_of(x))
    shape = shape_of(x)[:dim] + shape_of(x)[dim + 1 :]
    return tuple(b.reshape(b.slice(x, dim, i, i + 1), shape) for i in range(shape_of(x)[dim]))


def _split(b: Builder, node: fx.Node, x: fx.Node, size: Any, dim: int = 0) -> tuple[fx.Node, ...]:
    dim = dim % len(shape_of(x))
    length = shape_of(x)[dim]
    sizes = [min(size, length - i) for i in range(0, length, size)] if isinstance(size, int) else list(size)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return tuple(b.slice(x, dim, end - n, end) for n, end in zip(sizes, ends, strict=True))


def _stack(b: Builder, node: fx.Node, tensors: Sequence[fx.Node], dim: int = 0) -> fx.Node:
    dim = dim % len(shape_of(node))
    shape = [1 if d == dim else s for d, s in enumerate(shape_of(node))]
    return b.cat([b.reshape(x, shape) for x in tensors], dim)


def _cat(b: Builder, node: fx.Node, tensors: Sequence[fx.Node], dim: int = 0) -> fx.Node:
    return b.cat(tensors, dim % len(shape_of(node)))


def _slice_scatter(
    b: Builder,
    node: fx.Node,
    x: fx.Node,
    source: fx.Node,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> fx.Node:
    dim = dim % len(shape_of(x))
    start, end, step = slice(start, end, step).indices(shape_of(x)[dim])
    if step != 1:
        return b.emit(aten.slice_scatter.default, x, source, dim, start, end, step)
    parts = [b.slice(x, dim, 0, start), source, b.slice(x, dim, end, shape_of(x)[dim])]
    return b.cat(parts, dim)


def _select_scatter(b: Builder, node: fx.Node, x: fx.Node, source: fx.Node, dim: int, index: int) -> fx.Node:
    dim = dim % len(shape_of(x))
    index = index % shape_of(x)[dim]
    shape = [1 if d == dim else s for d, s in enumerate(shape_of(x))]
    return _slice_scatter(b, node, x, b.reshape(source, shape), dim, index, index + 1)


def _pad(
    b: Builder, node: fx.Node, x: fx.Node, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> fx.Node:
    if not any(pad):
        return x
    if mode == "constant":
        for i, amount in enumerate(pad):
            if amount < 0:
                dim = len(shape_of(x)) - 1 - i // 2
                size = shape_of(x)[dim]
                x = b.slice(x, dim, 0, size + amount) if i % 2 else b.slice(x, dim, -amount, size)
        pad = [max(amount, 0) for amount in pad]
        if not any(pad):
            return x
        return b.emit(aten.constant_pad_nd.default, x, list(pad), 0 if value is None else value)
    return b.emit(aten.pad.default, x, list(pad), mode)


def _mirrored(mode: str) -> Form:
    return lambda b, node, x, pad: _pad(b, node, x, pad, mode)


TABLE: dict[Any, Form] = {
    aten.slice.Tensor: _slice,
    aten.narrow.default: lambda b, node, x, dim, start, length: _slice(b, node, x, dim, start, start + length),
    aten.select.int: _select,
    aten.unbind.int: _unbind,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.stack.default: _stack,
    aten.cat.default: _cat,
    aten.concat.default: _cat,
    aten.concatenate.default: _cat,
    aten.slice_scatter.default: _slice_scatter,
    aten.select_scatter.default: _select_scatter,
    aten.pad.default: _pad,
    aten.constant_pad_nd.default: lambda b, node, x, pad, value=0: _pad(b, node, x, pad, "constant", value),
    **{getattr(aten, f"reflection_pad{n}d").default: _mirrored("reflect") for n in (1, 2, 3)},
    **{getattr(aten, f"replication_pad{n}d").default: _mirrored("replicate") for n in (1, 2, 3)},
}
