"""Rules of operators that treat rows independently, so that rows may be selected after them instead of before.

A rule is the `row_wise` of an operator's `OpSpec`. It is called with the resolver, the recorded operator and its
operands, some of which are `SelectedRows`. It returns `SelectedRows`, or raises `RefusedError`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

aten = torch.ops.aten


@dataclass(frozen=True)
class Domain:
    """Which of `size` rows are selected, and the key by which they are sorted."""

    size: int
    mask: Tensor | None = None  #: of the rows; None: all
    what: Any = None  #: identifies the mask
    order: int | None = None  #: identifies what they are sorted by; None: as they come
    members: tuple[int, ...] | None = None  #: values of the key whose rows are selected; None: all
    empty: bool = False  #: whether to build the program for the case that no row is selected


@dataclass(frozen=True)
class SelectedRows:
    """All rows in place of a selection of rows: row i is row `at[i]` of `base` along `dim`.

    A `base` that is not fake is an index: its values are constants.
    """

    domain: Domain
    base: Tensor
    dim: int = 0
    at: np.ndarray | None = None  #: None: row i

    @property
    def ndim(self) -> int:
        return self.base.ndim

    @property
    def constant(self) -> np.ndarray | None:
        return None if isinstance(self.base, FakeTensor) else self.base.numpy()


@dataclass(frozen=True)
class Inverse:
    """The permutation that undoes a sort by the key `order`."""

    order: int


class RefusedError(Exception):
    """An operator does not treat rows independently; the message says why."""


class Resolver(Protocol):
    """The interface for rules: `rows._Resolver`."""

    identities: dict[fx.Node, int]

    def emit(self, op: Any, *args: Any, **kwargs: Any) -> Any: ...

    def lifted(self, x: SelectedRows) -> Tensor: ...

    def masked(self, x: SelectedRows) -> Tensor: ...


def shared(rows: Sequence[SelectedRows]) -> Domain:
    first = rows[0].domain
    if any((x.domain.what, x.domain.order, x.domain.size) != (first.what, first.order, first.size) for x in rows):
        raise RefusedError("it brings together rows of several selections")
    return first


def aligned(r: Resolver, rows: Sequence[SelectedRows]) -> tuple[list[Tensor], np.ndarray | None]:
    """Bases with corresponding rows, and the positions of the rows in them."""
    first = rows[0]
    places = {None if x.at is None else x.at.tobytes() for x in rows}
    if len(places) == 1 and len({x.base.shape[x.dim] for x in rows}) == 1:
        return [x.base for x in rows], first.at
    return [r.lifted(x) for x in rows], None


def pointwise(r: Resolver, node: fx.Node, *args: Any, **kwargs: Any) -> SelectedRows:
    """Broadcast the operands. Operands that are no rows must not vary along the dim of the rows."""
    rows = [a for a in args if isinstance(a, SelectedRows)]
    domain = shared(rows)
    ndim = max(
        a.base.ndim if isinstance(a, SelectedRows) else a.ndim for a in args if isinstance(a, (SelectedRows, Tensor))
    )
    places = {ndim - x.base.ndim + x.dim for x in rows}
    if len(places) > 1:
        raise RefusedError("it brings rows along several dims together")
    dim = places.pop()
    for a in args:
        if isinstance(a, Tensor) and a.ndim >= ndim - dim and a.shape[dim - ndim] != 1:
            raise RefusedError("it brings selected rows together with others")
    bases, at = aligned(r, rows)
    supply = iter(bases)
    return SelectedRows(
        domain,
        r.emit(node.target, *[next(supply) if isinstance(a, SelectedRows) else a for a in args], **kwargs),
        dim,
        at,
    )


def product(r: Resolver, node: fx.Node, *args: Any, **kwargs: Any) -> SelectedRows:
    """`linear`, `mm`, `matmul` and `addmm` of rows with a matrix."""
    x, others = (args[1], [args[0], args[2]]) if node.target is aten.addmm.default else (args[0], list(args[1:]))
    matrix = others[-1] if node.target is aten.addmm.default else others[0]
    if (
        not isinstance(x, SelectedRows)
        or any(isinstance(o, SelectedRows) for o in others)
        or x.dim == x.base.ndim - 1
        or matrix.ndim > 2
    ):
        raise RefusedError("it multiplies other than rows by a matrix")
    if node.target is aten.addmm.default and args[0].ndim == 2 and args[0].shape[0] != 1:
        raise RefusedError("it brings selected rows together with others")
    return replace(x, base=r.emit(node.target, *[x.base if a is x else a for a in args], **kwargs))


def along(place: int, default: Any = None) -> Callable[..., Any]:
    """A rule for operators along the dims in argument `place`. The dim of the rows must not be among them."""

    def rule(r: Resolver, node: fx.Node, x: Any, *args: Any, **kwargs: Any) -> Any:
        dims = args[place] if len(args) > place else kwargs.get("dim", default)
        dims = [dims] if isinstance(dims, int) else dims
        if not isinstance(x, SelectedRows) or not dims or x.dim in [d % x.base.ndim for d in dims]:
            raise RefusedError(f"{node.target} works along the selected rows")
        result = r.emit(node.target, x.base, *args, **kwargs)
        first = result[0] if isinstance(result, (tuple, list)) else result
        dim = x.dim - (sum(d % x.base.ndim < x.dim for d in dims) if first.ndim < x.base.ndim else 0)
        if isinstance(result, (tuple, list)):
            return [replace(x, base=part, dim=dim) for part in result]
        return replace(x, base=result, dim=dim)

    return rule


def norm(r: Resolver, node: fx.Node, x: Any, shape: list[int], *args: Any, **kwargs: Any) -> SelectedRows:
    if not isinstance(x, SelectedRows) or x.dim >= x.base.ndim - len(shape):
        raise RefusedError("it takes statistics over the selected rows")
    return replace(x, base=r.emit(node.target, x.base, shape, *args, **kwargs))


def reshape(r: Resolver, node: fx.Node, x: SelectedRows, *_: Any) -> SelectedRows:
    """Reshape; the dim of the rows must remain a dim."""
    shape = list(node.meta["val"].shape)
    before = prod(x.base.shape[: x.dim])
    for dim, size in enumerate(shape):
        if size == x.domain.size and prod(shape[:dim]) == before:
            shape[dim] = x.base.shape[x.dim]
            return replace(x, base=r.emit(aten.reshape.default, x.base, shape), dim=dim)
    raise RefusedError("it merges the selected rows with another dim")


def _permuted(order: Callable[..., list[int]]) -> Callable[..., SelectedRows]:
    def rule(r: Resolver, node: fx.Node, x: SelectedRows, *args: Any) -> SelectedRows:
        dims = order(x.base.ndim, *args)
        return replace(x, base=r.emit(aten.permute.default, x.base, dims), dim=dims.index(x.dim))

    return rule


def _swap(ndim: int, first: int = 0, second: int = 1) -> list[int]:
    order = list(range(ndim))
    order[first], order[second] = order[second], order[first]
    return order


def expand(r: Resolver, node: fx.Node, x: SelectedRows, sizes: list[int], **_: Any) -> SelectedRows:
    dim = x.dim + len(sizes) - x.base.ndim
    sizes = [x.base.shape[x.dim] if d == dim else size for d, size in enumerate(sizes)]
    return replace(x, base=r.emit(aten.expand.default, x.base, sizes), dim=dim)


def repeat(r: Resolver, node: fx.Node, x: SelectedRows, times: list[int]) -> SelectedRows:
    dim = x.dim + len(times) - x.base.ndim
    if times[dim] != 1:
        raise RefusedError("it repeats the selected rows")
    wide = [1] * (len(times) - x.base.ndim) + list(x.base.shape)
    if x.constant is not None and all(1 in pair for pair in zip(times, wide, strict=True)):
        return replace(x, base=x.base.expand([t * n for t, n in zip(times, wide, strict=True)]), dim=dim)  # no memory
    return replace(x, base=r.emit(aten.repeat.default, x.base, times), dim=dim)


def same(r: Resolver, node: fx.Node, x: SelectedRows, *args: Any, **kwargs: Any) -> SelectedRows:
    return replace(x, base=r.emit(node.target, x.base, *args, **kwargs))


def like(r: Resolver, node: fx.Node, x: SelectedRows, *args: Any, **kwargs: Any) -> Any:
    """Make equal rows. If rows are only sorted, not selected, all are there: the result is a plain tensor."""
    result = replace(x, base=r.emit(node.target, x.base, *args, **kwargs))
    return r.lifted(result) if x.domain.mask is None else result


def slice_(r: Resolver, node: fx.Node, x: SelectedRows, dim: int = 0, *span: int) -> SelectedRows:
    everything = x.domain.mask is None and dim % x.base.ndim == x.dim and x.domain.size == node.meta["shape"][dim]
    return x if everything else along(0, 0)(r, node, x, dim, *span)


def new(r: Resolver, node: fx.Node, x: SelectedRows, *args: Any, **kwargs: Any) -> Tensor:
    return r.emit(node.target, x.base, *args, **kwargs)


def cat(r: Resolver, node: fx.Node, parts: Sequence[Any], dim: int = 0) -> SelectedRows:
    parts = [x for x in parts if isinstance(x, SelectedRows) or x.shape[dim]]
    if len(parts) == 1:
        return parts[0]
    if (
        any(not isinstance(x, SelectedRows) or x.dim == dim % x.base.ndim for x in parts)
        or len({x.dim for x in parts}) > 1
    ):
        raise RefusedError("it joins selected rows with others")
    bases, at = aligned(r, parts)
    return SelectedRows(shared(parts), r.emit(aten.cat.default, bases, dim), parts[0].dim, at)


permute = _permuted(lambda ndim, dims: [d % ndim for d in dims])
transpose = _permuted(_swap)
