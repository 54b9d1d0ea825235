"""Operators on small integer tensors whose elements are numbers or `Count`s.

A model may keep the numbers of rows in tensors: `ends = counts.cumsum(0)`, then `ends[i]`. A rule is called with the
recorded operator and its arguments, each tensor as a NumPy array of objects; it returns the result as such an array.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

aten = torch.ops.aten


def array(value: Any) -> np.ndarray:
    """An array of objects, also of a single object."""
    if isinstance(value, np.ndarray):
        return value.astype(object)
    result = np.empty(np.shape(value) if isinstance(value, (list, tuple)) else (), dtype=object)
    result[...] = value
    return result


def _reshape(node: fx.Node, x: np.ndarray, *_: Any, **__: Any) -> np.ndarray:
    return x.reshape(tuple(node.meta["shape"]))


def _slice(
    node: fx.Node, x: np.ndarray, dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1
) -> np.ndarray:
    return np.moveaxis(np.moveaxis(x, dim, 0)[start:stop:step], 0, dim)


def _cat(node: fx.Node, parts: Sequence[np.ndarray], dim: int = 0) -> np.ndarray:
    return np.concatenate(parts, axis=dim)


def _pad(node: fx.Node, x: np.ndarray, pads: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    if x.ndim != 1 or len(pads) != 2 or min(pads) < 0 or mode != "constant":
        return None
    before, after = (array([int(value or 0)] * size) for size in pads)
    return np.concatenate([before, x, after])


def _sum(sign: int) -> Callable[..., np.ndarray]:
    return lambda node, x, y, alpha=1: array(x + y * (sign * alpha))


def _compare(relation: Callable[[Any, Any], Any]) -> Callable[..., np.ndarray]:
    return lambda node, x, y: array(relation(x, y))


#: A rule returns None where it does not know the result.
RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim), _reshape),
    **dict.fromkeys((aten._to_copy.default, aten.clone.default, aten.alias.default), _reshape),
    aten.cumsum.default: lambda node, x, dim, **_: np.cumsum(x, axis=dim),
    aten.select.int: lambda node, x, dim, i: array(np.take(x, i, axis=dim)),
    aten.unbind.int: lambda node, x, dim=0: [array(part) for part in np.moveaxis(x, dim, 0)],
    operator.getitem: lambda node, parts, i: parts[i],
    aten.slice.Tensor: _slice,
    aten.cat.default: _cat,
    aten.pad.default: _pad,
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), _sum(1)),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), _sum(-1)),
}
for _name in ("gt", "lt", "ge", "le", "eq", "ne"):
    for _overload in ("Scalar", "Tensor"):
        RULES[getattr(getattr(aten, _name), _overload)] = _compare(getattr(operator, _name))
