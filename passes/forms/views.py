"""Views become `reshape`, `permute` and `expand`."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import fx

from ...capture import row_rules as rows
from ...capture.kinds import mutates
from ...ir.operators import OpSpec
from ...ir.program import shape_of
from ..builder import Builder

aten = torch.ops.aten


def to_result_shape(b: Builder, node: fx.Node, x: fx.Node, *_: Any, **__: Any) -> fx.Node:
    return b.reshape(x, shape_of(node))


def _transpose(b: Builder, node: fx.Node, x: fx.Node, *dims: int) -> fx.Node:
    order = list(range(len(shape_of(x))))
    first, second = dims or ((0, 1) if len(order) == 2 else (0, 0))
    order[first], order[second] = order[second], order[first]
    return b.permute(x, order)


def permute(b: Builder, node: fx.Node, x: fx.Node, dims: Sequence[int]) -> fx.Node:
    return b.permute(x, dims)


def expand(b: Builder, node: fx.Node, x: fx.Node, *_: Any, **__: Any) -> fx.Node:
    shape = shape_of(node)
    return x if shape == shape_of(x) else b.emit(aten.expand.default, x, list(shape))


def _repeat(b: Builder, node: fx.Node, x: fx.Node, repeats: Sequence[int]) -> fx.Node:
    shape = (1,) * (len(repeats) - len(shape_of(x))) + shape_of(x)
    pairs = [d for n in shape for d in (1, n)]
    wide = [d for r, n in zip(repeats, shape, strict=True) for d in (r, n)]
    return b.reshape(b.emit(aten.expand.default, b.reshape(x, pairs), wide), shape_of(node))


def _repeat_interleave(
    b: Builder, node: fx.Node, x: fx.Node, repeats: int, dim: int | None = None, **_: Any
) -> fx.Node:
    if dim is None:
        x, dim = b.reshape(x, [prod(shape_of(x))]), 0
    shape, dim = shape_of(x), dim % len(shape_of(x))
    wide = [*shape[: dim + 1], repeats, *shape[dim + 1 :]]
    thin = [*shape[: dim + 1], 1, *shape[dim + 1 :]]
    return b.reshape(b.emit(aten.expand.default, b.reshape(x, thin), wide), shape_of(node))


def _pixel_shuffle(b: Builder, node: fx.Node, x: fx.Node, r: int) -> fx.Node:
    *lead, c, h, w = shape_of(x)
    n = len(lead)
    y = b.reshape(x, [*lead, c // (r * r), r, r, h, w])
    return b.reshape(b.permute(y, [*range(n + 1), n + 3, n + 1, n + 4, n + 2]), shape_of(node))


def _pixel_unshuffle(b: Builder, node: fx.Node, x: fx.Node, r: int) -> fx.Node:
    *lead, c, h, w = shape_of(x)
    n = len(lead)
    y = b.reshape(x, [*lead, c, h // r, r, w // r, r])
    return b.reshape(b.permute(y, [*range(n + 1), n + 2, n + 4, n + 1, n + 3]), shape_of(node))


def _diagonal(b: Builder, node: fx.Node, x: fx.Node, offset: int = 0, dim1: int = 0, dim2: int = 1) -> fx.Node:
    """Every (columns + 1)-th element of the flattened matrix."""
    ndim = len(shape_of(x))
    dim1, dim2 = dim1 % ndim, dim2 % ndim
    x = b.permute(x, [*(d for d in range(ndim) if d not in (dim1, dim2)), dim1, dim2])
    *lead, rows, columns = shape_of(x)
    length = shape_of(node)[-1]
    start = offset if offset >= 0 else -offset * columns
    x = b.reshape(x, [*lead, rows * columns])
    return b.slice(x, ndim - 2, start, min(start + length * (columns + 1), rows * columns), columns + 1)


def roll(b: Builder, node: fx.Node, x: fx.Node, shifts: Sequence[int], dims: Sequence[int] | None = None) -> fx.Node:
    if dims:
        return b.emit(aten.roll.default, x, shifts, dims)
    flat = b.reshape(x, [prod(shape_of(x))])
    return b.reshape(b.emit(aten.roll.default, flat, shifts, [0]), shape_of(x))


#: other names for `reshape`
_RESHAPES = (aten.view, aten._unsafe_view, aten.unsqueeze, aten.squeeze, aten.flatten, aten.unflatten)
TABLE = {
    getattr(packet, overload): OpSpec(form=to_result_shape, row_wise=rows.reshape)
    for packet in _RESHAPES
    for overload in packet.overloads()
    if getattr(packet, overload) is not aten.view.dtype and not mutates(getattr(packet, overload))
} | {
    aten.view_as.default: OpSpec(form=to_result_shape),
    aten.t.default: OpSpec(form=_transpose, row_wise=rows.transpose),
    aten.transpose.int: OpSpec(form=_transpose, row_wise=rows.transpose),
    aten.expand_as.default: OpSpec(form=expand),
    aten.repeat.default: OpSpec(form=_repeat, row_wise=rows.repeat),
    aten.repeat_interleave.self_int: OpSpec(form=_repeat_interleave),
    aten.pixel_shuffle.default: OpSpec(form=_pixel_shuffle),
    aten.pixel_unshuffle.default: OpSpec(form=_pixel_unshuffle),
    aten.diagonal.default: OpSpec(form=_diagonal),
}
