"""Copies and look-ups. Copies that change nothing are dropped; changes of dtype become `_to_copy`."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import fx

from ...ir.operators import OpSpec
from ...ir.program import shape_of
from ..builder import Builder
from .views import expand

aten = torch.ops.aten


def _itself(b: Builder, node: fx.Node, x: fx.Node, *_: Any, **__: Any) -> fx.Node:
    return x


def clone(b: Builder, node: fx.Node, x: fx.Node, *, memory_format: Any = None, **_: Any) -> fx.Node:
    """Kept if it changes the memory format: otherwise a convolution would convert its weights at every call."""
    if memory_format in (None, torch.preserve_format) or x.meta["val"].is_contiguous(memory_format=memory_format):
        return x
    return b.emit(aten.clone.default, x, memory_format=memory_format)


def _contiguous(b: Builder, node: fx.Node, x: fx.Node, **_: Any) -> fx.Node:
    return clone(b, node, x, memory_format=torch.contiguous_format)


def to_copy(b: Builder, node: fx.Node, x: fx.Node | float, **kwargs: Any) -> fx.Node:
    dtype, device = kwargs.get("dtype"), kwargs.get("device")
    if not isinstance(x, fx.Node):  # vmap may put a number in place of a tensor
        return b.copy(aten.full.default, ([], x), {"dtype": dtype or node.meta["dtype"]}, node.meta["val"])
    if dtype in (None, x.meta["dtype"]) and device in (None, x.meta["val"].device):
        return x
    changes = {k: v for k, v in kwargs.items() if k in ("dtype", "device") and v is not None}
    return b.emit(aten._to_copy.default, x, **changes)


def _type_as(b: Builder, node: fx.Node, x: fx.Node, other: fx.Node) -> fx.Node:
    return to_copy(b, node, x, dtype=other.meta["dtype"])


def _copy(b: Builder, node: fx.Node, x: fx.Node, source: fx.Node, *_: Any) -> fx.Node:
    return to_copy(b, node, expand(b, node, source), dtype=x.meta["dtype"])


def conjugated(b: Builder, node: fx.Node, x: fx.Node) -> fx.Node:
    """Computed at once: copies that are dropped, and messages, may have done so to what is conjugated lazily."""
    return b.emit(aten.conj_physical.default, x)


def negated(b: Builder, node: fx.Node, x: fx.Node) -> fx.Node:
    """As `conjugated`."""
    return b.emit(aten.neg.default, x)


def index_put(
    b: Builder, node: fx.Node, x: fx.Node, indices: Sequence[Any], values: fx.Node, accumulate: bool = False
) -> fx.Node:
    """Writing one row wherever a mask is true is a `where`."""
    mask, before = indices[-1], len(indices) - 1
    masked = mask.meta["dtype"] == torch.bool and all(i is None for i in indices[:-1])
    after = len(shape_of(x)) - before - len(shape_of(mask))
    given = shape_of(values)
    place = len(given) - 1 - after  # the dim of `values` that counts the true elements
    if not masked or accumulate or (place >= 0 and given[place] != 1):
        return b.emit(aten.index_put.default, x, indices, values, accumulate)
    if place >= 0:
        values = b.reshape(values, [*given[:place], *(1 for _ in shape_of(mask)), *given[place + 1 :]])
    mask = b.reshape(mask, [*shape_of(mask), *(1,) * after])
    return b.emit(aten.where.self, mask, to_copy(b, node, values, dtype=x.meta["dtype"]), x)


def _take_along_dim(b: Builder, node: fx.Node, x: fx.Node, indices: fx.Node, dim: int | None = None) -> fx.Node:
    if dim is None:
        x, indices = (b.reshape(t, [prod(shape_of(t))]) for t in (x, indices))
    shapes = [list(shape_of(t)) for t in (x, indices)]
    dim = (dim or 0) % len(shapes[0])
    for d, sizes in enumerate(zip(*shapes, strict=True)):
        if d != dim:
            shapes[0][d] = shapes[1][d] = max(sizes)
    wide = [
        t if list(shape_of(t)) == shape else b.emit(aten.expand.default, t, shape)
        for t, shape in zip((x, indices), shapes, strict=True)
    ]
    return b.emit(aten.gather.default, wide[0], dim, wide[1])


TABLE = {
    aten.alias.default: OpSpec(form=_itself),
    aten.detach.default: OpSpec(form=_itself),
    aten.detach_.default: OpSpec(form=_itself),
    aten.contiguous.default: OpSpec(form=_contiguous),
    aten.lift_fresh_copy.default: OpSpec(form=_itself),
    aten.lift_fresh.default: OpSpec(form=_itself),
    aten.type_as.default: OpSpec(form=_type_as),
    aten.copy.default: OpSpec(form=_copy),
    aten.take_along_dim.default: OpSpec(form=_take_along_dim),
}
