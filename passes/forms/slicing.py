"""Ways to slice, join and pad become `slice`, `cat` and `pad`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ...capture import row_rules as rows
from ...ir.operators import OpSpec
from ...ir.program import shape_of
from ..builder import Builder, Form

aten = torch.ops.aten


def slice_(
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


def cat(b: Builder, node: fx.Node, tensors: Sequence[fx.Node], dim: int = 0) -> fx.Node:
    return b.cat(tensors, dim % len(shape_of(node)))


def slice_scatter(
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
    return slice_scatter(b, node, x, b.reshape(source, shape), dim, index, index + 1)


def pad(
    b: Builder, node: fx.Node, x: fx.Node, amounts: Sequence[int], mode: str = "constant", value: float | None = None
) -> fx.Node:
    if not any(amounts):
        return x
    if mode == "constant":
        for i, amount in enumerate(amounts):
            if amount < 0:
                dim = len(shape_of(x)) - 1 - i // 2
                size = shape_of(x)[dim]
                x = b.slice(x, dim, 0, size + amount) if i % 2 else b.slice(x, dim, -amount, size)
        amounts = [max(amount, 0) for amount in amounts]
        if not any(amounts):
            return x
        return b.emit(aten.constant_pad_nd.default, x, list(amounts), 0 if value is None else value)
    return b.emit(aten.pad.default, x, list(amounts), mode)


def _mirrored(mode: str) -> Form:
    return lambda b, node, x, amounts: pad(b, node, x, amounts, mode)


def constant_pad(b: Builder, node: fx.Node, x: fx.Node, amounts: Sequence[int], value: float = 0) -> fx.Node:
    return pad(b, node, x, amounts, "constant", value)


def _narrow(b: Builder, node: fx.Node, x: fx.Node, dim: int, start: int, length: int) -> fx.Node:
    return slice_(b, node, x, dim, start, start + length)


TABLE = {
    aten.narrow.default: OpSpec(form=_narrow),
    aten.select.int: OpSpec(form=_select, row_wise=rows.along(0)),
    aten.unbind.int: OpSpec(form=_unbind, row_wise=rows.along(0, 0)),
    aten.split.Tensor: OpSpec(form=_split, row_wise=rows.along(1, 0)),
    aten.split_with_sizes.default: OpSpec(form=_split, row_wise=rows.along(1, 0)),
    aten.stack.default: OpSpec(form=_stack),
    aten.concat.default: OpSpec(form=cat),
    aten.concatenate.default: OpSpec(form=cat),
    aten.select_scatter.default: OpSpec(form=_select_scatter),
    aten.reflection_pad1d.default: OpSpec(form=_mirrored("reflect")),
    aten.reflection_pad2d.default: OpSpec(form=_mirrored("reflect")),
    aten.reflection_pad3d.default: OpSpec(form=_mirrored("reflect")),
    aten.replication_pad1d.default: OpSpec(form=_mirrored("replicate")),
    aten.replication_pad2d.default: OpSpec(form=_mirrored("replicate")),
    aten.replication_pad3d.default: OpSpec(form=_mirrored("replicate")),
}
