"""Write selected rows back: `index_add`, scatters, `index_put`. Unselected rows are masked.

Rules are called like those of `row_rules`. They refuse writes at computed positions, and writes that separate the
elements of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from .counts import aten
from .row_rules import Inverse, RefusedError, Resolver, SelectedRows, shared


def _whole(x: SelectedRows) -> np.ndarray:
    values = x.constant
    assert values is not None
    return values if x.at is None else np.take(values, x.at, x.dim)


def flat_index(indices: Sequence[SelectedRows], sizes: Sequence[int]) -> np.ndarray:
    """Positions along several dims, as positions along the flattened dims."""
    parts = tuple(_whole(i) % n for i, n in zip(indices, sizes, strict=True))
    return np.asarray(np.ravel_multi_index(parts, tuple(sizes)))


def _target(index: Any, dim: int, shape: Sequence[int]) -> np.ndarray:
    """For each row, the target row that it is written to. The index of a scatter has the `shape` of its source."""
    if not isinstance(index, SelectedRows) or index.constant is None:
        raise RefusedError("it adds rows at computed positions")
    values = _whole(index)
    if values.ndim == 1:
        return values
    if index.dim != dim or values.shape != tuple(shape):
        raise RefusedError("it adds parts of rows")
    values = np.moveaxis(values, dim, 0)
    values = values[
        :, *(slice(1) if step == 0 else slice(None) for step in values.strides[1:])
    ]  # one entry of a broadcast dim
    values = values.reshape(len(values), -1)
    if (values != values[:, :1]).any():
        raise RefusedError("it adds the elements of one row to several rows")
    return values[:, 0]


def add_rows(r: Resolver, node: fx.Node, x: Any, dim: int, index: Any, source: Any, *rest: Any, **kwargs: Any) -> Any:
    """`index_add`, `scatter_add` and `scatter_reduce`: unselected rows add zero."""
    if node.target is aten.scatter_reduce.two and (rest != ("sum",) or not kwargs.get("include_self", True)):
        raise RefusedError("it reduces rows by another function than a sum")
    if isinstance(x, (SelectedRows, Inverse)):
        raise RefusedError("it adds rows to selected rows")
    if not isinstance(source, SelectedRows) or source.dim != dim % x.ndim:
        raise RefusedError("it adds, at selected rows, values that are not of these rows")
    domain, dim = shared([index, source]), dim % x.ndim
    if domain.empty:
        return x
    values = r.masked(source)
    if [n for d, n in enumerate(values.shape) if d != dim] != [n for d, n in enumerate(x.shape) if d != dim]:
        raise RefusedError("it adds parts of rows")
    to = _target(index, dim, values.shape)
    if "alpha" in kwargs:
        values = r.emit(aten.mul.Scalar, values, kwargs["alpha"])
    if values.dtype != x.dtype:
        values = r.emit(aten._to_copy.default, values, dtype=x.dtype)
    rows, times = x.shape[dim], domain.size // x.shape[dim]
    inner = list(values.shape[dim + 1 :])
    for split, place, pattern in (
        ([rows, times], dim + 1, np.repeat(np.arange(rows), times)),
        ([times, rows], dim, np.tile(np.arange(rows), times)),
    ):
        if np.array_equal(to, pattern):
            if times > 1:
                values = r.emit(aten.reshape.default, values, [*values.shape[:dim], *split, *inner])
                values = r.emit(aten.sum.dim_IntList, values, [place])
            return r.emit(aten.add.Tensor, x, values)
    return r.emit(aten.index_add.default, x, dim, torch.from_numpy(to.copy()), values)


def put_rows(
    r: Resolver, node: fx.Node, x: Any, indices: Sequence[Any], source: Any, add: bool = False, *_: Any
) -> Any:
    """`x[index] = source`: unselected rows keep their values."""
    if isinstance(source, SelectedRows) and len(indices) == 1 and isinstance(indices[0], Tensor):
        mask = indices[0]
        what = ("mask", r.identities[node.args[1][0]])  # type: ignore[index]
        if (
            mask.dtype is not torch.bool
            or isinstance(x, SelectedRows)
            or source.domain.what != what
            or add
            or source.dim
        ):
            raise RefusedError("it writes selected rows by another selection")
        lead, domain = list(mask.shape), source.domain
    else:
        if any(not isinstance(i, SelectedRows) or i.constant is None for i in indices):
            raise RefusedError("it writes at computed positions")
        if isinstance(source, Tensor):
            raise RefusedError("it writes, to selected rows, values that are not of these rows")
        domain = shared([*indices, source])
        target = x.base if isinstance(x, SelectedRows) else x
        lead = list(target.shape[: len(indices)])
        if add and len(indices) == 1 and not isinstance(x, SelectedRows):
            return add_rows(r, node, x, 0, indices[0], source)
        at = flat_index(indices, lead)
        if add or source.dim:
            raise RefusedError("it writes rows at computed positions")
        if isinstance(x, SelectedRows) and (x.domain.mask is not None or domain.mask is not None):
            raise RefusedError("it writes selected rows to selected rows")
        if domain.mask is not None and len(at) > prod(lead):
            return x if domain.empty else _put_each(r, target, lead, at, domain.mask, r.lifted(source))
        if not np.array_equal(at, np.arange(prod(lead))):
            raise RefusedError("it writes rows at other positions than their own")
        mask = None if domain.mask is None else r.emit(aten.reshape.default, domain.mask, lead)
    if domain.empty:
        return x
    values = r.lifted(source)
    target = x.base if isinstance(x, SelectedRows) else x
    values = r.emit(aten.reshape.default, values, list(target.shape))
    if values.dtype != target.dtype:
        values = r.emit(aten._to_copy.default, values, dtype=target.dtype)
    if mask is None:
        return values
    mask = r.emit(aten.reshape.default, mask, [*lead, *[1] * (values.ndim - len(lead))])
    return r.emit(aten.where.self, mask, values, target)


def _put_each(r: Resolver, x: Tensor, lead: list[int], at: np.ndarray, mask: Tensor, values: Tensor) -> Tensor:
    """`x[index] = source` where several rows have one target. In torch any of them may win; here the last one does."""
    rows, times = prod(lead), len(at) // prod(lead)
    shape, dim, inner = [rows, times], 1, list(x.shape[len(lead) :])
    if np.array_equal(at, np.tile(np.arange(rows), times)):
        shape, dim = [times, rows], 0
    elif not np.array_equal(at, np.repeat(np.arange(rows), times)):
        raise RefusedError("it writes rows at other positions than their own")
    mask = r.emit(aten.reshape.default, mask, shape)
    values = r.emit(aten.reshape.default, values, [*shape, *inner])
    if values.dtype != x.dtype:
        values = r.emit(aten._to_copy.default, values, dtype=x.dtype)
    for slot in range(times):
        chosen = r.emit(aten.reshape.default, r.emit(aten.select.int, mask, dim, slot), [*lead, *[1] * len(inner)])
        row = r.emit(aten.reshape.default, r.emit(aten.select.int, values, dim, slot), list(x.shape))
        x = r.emit(aten.where.self, chosen, row, x)
    return x
