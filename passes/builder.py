"""Build graphs in normal form.

Each new operator runs on fake tensors, for its shape and dtype. Equal operators on equal operands are merged.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from ..capture.fakes import form_of
from ..ir.nodes import append, call_key
from ..ir.program import shape_of

aten = torch.ops.aten

Form = Callable[..., Any]  #: (builder, node, *its arguments) -> its normal form


class Builder:
    """Emits operators into a new graph. Merging is safe: captured programs have no operators with random results."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.source: fx.Node | None = None
        self._values: dict[Any, Any] = {}
        self._emitted: dict[Any, fx.Node] = {}

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        fakes = map_arg((args, kwargs), lambda n: n.meta["val"])
        key = target, form_of(fakes)
        if key not in self._values:
            self._values[key] = _run(target, *fakes)
        return self.copy(target, args, kwargs, self._values[key])

    def copy(self, target: Any, args: Any, kwargs: Any, value: Any) -> fx.Node:
        key = call_key(target, args, kwargs)
        if key not in self._emitted:
            self._emitted[key] = self.append(target, args, kwargs, value)
        return self._emitted[key]

    def append(self, target: Any, args: Any, kwargs: Any, value: Any) -> fx.Node:
        """Emit an operator even if an equal one exists."""
        assert self.source is not None
        meta = {k: v for k, v in self.source.meta.items() if k in ("path", "trace")} | {"val": value}
        if isinstance(value, Tensor):
            meta |= {"shape": tuple(value.shape), "dtype": value.dtype}
        return append(self.graph, target, args, kwargs, meta)

    def reshape(self, x: fx.Node, shape: Sequence[int]) -> fx.Node:
        return x if tuple(shape) == shape_of(x) else self.emit(aten.reshape.default, x, list(shape))

    def permute(self, x: fx.Node, dims: Sequence[int]) -> fx.Node:
        dims = [d % len(dims) for d in dims]
        return x if dims == sorted(dims) else self.emit(aten.permute.default, x, dims)

    def slice(self, x: fx.Node, dim: int, start: int, end: int, step: int = 1) -> fx.Node:
        size = shape_of(x)[dim]
        return x if (start, end, step) == (0, size, 1) else self.emit(aten.slice.Tensor, x, dim, start, end, step)

    def cat(self, tensors: Sequence[fx.Node], dim: int) -> fx.Node:
        """Concatenate the tensors that are not empty; the result has the dtype that all of them promote to."""
        dtype = reduce(torch.promote_types, (x.meta["dtype"] for x in tensors))
        shaped = [x for x in tensors if shape_of(x) != (0,)] or list(tensors)  # torch skips them for any dim
        filled = [x for x in shaped if shape_of(x)[dim] != 0] or shaped[:1]
        joined = filled[0] if len(filled) == 1 else self.emit(aten.cat.default, filled, dim)
        return joined if joined.meta["dtype"] == dtype else self.emit(aten._to_copy.default, joined, dtype=dtype)


def _run(target: Any, args: Any, kwargs: Any) -> Any:
    fakes = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch._subclasses.FakeTensor)]
    if not fakes:
        return target(*args, **kwargs)
    with fakes[0].fake_mode:
        return target(*args, **kwargs)


def unpacked(b: Builder, node: fx.Node) -> Any:
    value = node.meta["val"]
    if not isinstance(value, (tuple, list)):
        return node
    return tuple(b.copy(operator.getitem, (node, i), {}, v) for i, v in enumerate(value))
