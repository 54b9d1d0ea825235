"""Make routing by activations static: compute each expert on all rows, and mask the rows that the router left out.

In a recording (see `counts`) a selection of rows, or rows sorted by expert, are replaced by all rows. This is exact if
each operator treats rows independently, and if unselected rows do not reach the result. This module checks both,
operator by operator: `SelectedRows` says which rows a value holds, and in which order. It refuses operators that are
not known to treat rows independently. `row_writes` masks unselected rows where rows are written back.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from ..ir.nodes import append_copy
from ..ir.operators import spec_of
from ..ir.program import reached
from .compare import identities
from .counts import aten, ops
from .errors import CaptureError
from .recorder import Recorder
from .row_rules import Domain, Inverse, RefusedError, SelectedRows, aligned, shared
from .row_writes import flat_index


def resolve(old: Recorder, results: list[fx.Node], empty: int | None = None) -> tuple[Recorder, list[fx.Node]]:
    """Rewrite routing into static operators: a new recorder and its results; `old` itself if nothing is routed.

    Args:
        empty: 0 or 1: answer the even or the odd questions "are there any such rows?" with no; None: all with yes.

    Raises:
        CaptureError: an operator is not known to treat rows independently.
    """
    if not any(getattr(node.target, "namespace", "") == "fxpass_rows" for node in old.graph.nodes):
        return old, results
    with torch._C._AutoDispatchBelowAutograd():
        return _Resolver(old, empty).run(results)


class _Resolver:
    def __init__(self, old: Recorder, empty: int | None) -> None:
        self.old = old
        self.new = Recorder(old.fake_mode, {})
        self.values: dict[fx.Node, Any] = {}
        self.identities = identities(old.graph)
        asked = [n for n in old.graph.nodes if n.target is ops.asked.default]
        self.empty = {
            (self.identities[_source(n.args[0])], tuple(n.args[1]))
            for n in asked
            if empty is not None and n.args[2] % 2 == empty
        }
        self.orders = {self.identities[n.args[2]] for n in old.graph.nodes if n.target is ops.segment.default}

    def run(self, results: list[fx.Node]) -> tuple[Recorder, list[fx.Node]]:
        for node in self.old.graph.nodes:
            self.new.path, self.new.line = node.meta["path"], node.meta["trace"]
            if node.op == "placeholder":
                self._copy(node)
                self.new.origins[self.new.node(node.meta["val"])] = self.old.origins[node]
            elif node.target is not ops.asked.default:
                self._call(node)
        for node in results:
            if not isinstance(self.values[node], Tensor):
                raise _error(node, "an output has a size that depends on values")
        found = [self.new.node(self.values[node]) for node in results]
        needed = reached(found, operator.attrgetter("all_input_nodes"))
        if (node := next((n for n in needed if n.target is ops.counts.default), None)) is not None:
            raise _error(node, "its size depends on the largest value; pass bincount a minlength")
        return self.new, found

    def _copy(self, node: fx.Node) -> None:
        copy = append_copy(self.new.graph, node, lambda n: self.new.node(self.values[n]))
        self.values[node] = node.meta["val"]
        self.new.register(node.meta["val"], copy)

    def _call(self, node: fx.Node) -> None:
        op: Any = node.target
        rule = RULES.get(op) or spec_of(op).row_wise
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.values[n])
        routed = any(isinstance(self.values[n], (SelectedRows, Inverse)) for n in node.all_input_nodes)
        starts = op in _STARTS and self._sorts(node)
        if not routed and not starts and getattr(op, "namespace", "") != "fxpass_rows":
            if all(self.values[n] is n.meta["val"] for n in node.all_input_nodes):
                return self._copy(node)
            self.values[node] = args[0][args[1]] if op is operator.getitem else self.emit(op, *args, **kwargs)
            return None
        try:
            if op is operator.getitem:
                self.values[node] = args[0][args[1]]
            elif rule is None or any(isinstance(self.values[n], Inverse) for n in node.all_input_nodes[2:]):
                raise RefusedError(f"{op} is not known to treat rows independently")
            else:
                self.values[node] = rule(self, node, *args, **kwargs)
        except RefusedError as refusal:
            raise _error(node, str(refusal)) from None

    def _sorts(self, node: fx.Node) -> bool:
        return self.identities[node.args[0]] in self.orders and not _descending(node.args, node.kwargs)  # type: ignore[index]

    def emit(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute an operator if all operands are constants; else record it."""
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        if any(isinstance(leaf, FakeTensor) for leaf in leaves):
            with self.new:
                return op(*args, **kwargs)
        return op(*args, **kwargs)

    def lifted(self, x: SelectedRows) -> Tensor:
        """All rows of the domain, in its order."""
        if x.at is None:
            return x.base
        shape, at, dim = list(x.base.shape), x.at, x.dim
        before, after, rows, size = shape[:dim], shape[dim + 1 :], shape[dim], len(x.at)
        times, each = size // rows, np.arange(rows)
        for place, pattern in ((dim + 1, np.repeat(each, times)), (dim, np.tile(each, times))):
            if np.array_equal(at, pattern):
                wide = self.emit(aten.unsqueeze.default, x.base, place)
                wide = self.emit(aten.expand.default, wide, [*shape[:place], times, *shape[place:]])
                return self.emit(aten.reshape.default, wide, [*before, size, *after])
        step = int(at[1]) if rows == size > 1 else 0
        if step and rows % step == 0 and np.array_equal(at, each.reshape(-1, step).T.ravel()):
            table = self.emit(aten.reshape.default, x.base, [*before, rows // step, step, *after])
            table = self.emit(aten.transpose.int, table, dim, dim + 1)
            return self.emit(aten.reshape.default, table, [*before, rows, *after])
        return self.emit(aten.index_select.default, x.base, dim, torch.from_numpy(at.copy()))

    def masked(self, x: SelectedRows) -> Tensor:
        """All rows of the domain, with zeros in place of unselected ones."""
        values = self.lifted(x)
        if x.domain.mask is None:
            return values
        hidden = self.emit(aten.logical_not.default, x.domain.mask)
        shape = [1] * values.ndim
        shape[x.dim] = x.domain.size
        return self.emit(aten.masked_fill.Scalar, values, self.emit(aten.reshape.default, hidden, shape), 0)


def _error(node: fx.Node, why: str) -> CaptureError:
    return CaptureError(
        f"{node.target} at {node.meta['trace']} needs the value of an activation: the model selects rows by "
        f"activations, and {why}; keep all rows and use torch.where, or pass the decision in as an argument"
    )


def _source(mask: Any) -> Any:
    """The earliest node whose value has a true element exactly if `mask` has one."""
    while mask.target in (aten.any.dim, aten.view.default, aten._unsafe_view.default, aten.clone.default):
        mask = mask.args[0]
    return mask


# -- where rows begin -------------------------------------------------------------------------------------------


def _positions(r: _Resolver, node: fx.Node, mask: Tensor) -> SelectedRows:
    index = np.stack(np.unravel_index(np.arange(mask.numel()), tuple(mask.shape)), 1)
    flat = r.emit(aten.reshape.default, mask, [mask.numel()])
    if flat.dtype is not torch.bool:
        flat = r.emit(aten.ne.Scalar, flat, 0)
    what = r.identities[node.args[0]]  # type: ignore[index]
    asked = (r.identities[_source(node.args[0])], ())
    domain = Domain(mask.numel(), flat, ("mask", what), empty=asked in r.empty)
    return SelectedRows(domain, torch.from_numpy(index))


def sort(r: _Resolver, node: fx.Node, key: Any, *_: Any, **__: Any) -> Any:
    """Sort the key by which rows are sliced into segments."""
    if isinstance(key, SelectedRows):
        raise RefusedError("it sorts selected rows")
    if key.ndim != 1:
        raise RefusedError("it sorts a tensor of several dims")
    order = r.identities[node.args[0]]  # type: ignore[index]
    domain = Domain(len(key), order=order)
    index = SelectedRows(domain, torch.arange(len(key)))
    return index if node.target in (aten.argsort.default, aten.argsort.stable) else (SelectedRows(domain, key), index)


def _descending(args: Any, kwargs: Any) -> bool:
    return bool(args[2] if len(args) > 2 else kwargs.get("descending", False))


def argsort(r: _Resolver, node: fx.Node, key: Any, *rest: Any, **kwargs: Any) -> Any:
    if not isinstance(key, SelectedRows):
        return sort(r, node, key)
    index = key.constant if key.domain.mask is None and key.at is None else None
    in_order = index is not None and np.array_equal(index, np.arange(key.domain.size))
    if not in_order or _descending((key, *rest), kwargs):
        raise RefusedError("it sorts selected rows")
    return Inverse(key.domain.order)  # type: ignore[arg-type]


def _segment(r: _Resolver, node: fx.Node, x: Any, dim: int, key: Tensor, members: list[int]) -> SelectedRows:
    what = r.identities[node.args[2]]  # type: ignore[index]
    if not isinstance(x, SelectedRows) or x.domain.order != what or x.domain.mask is not None or x.dim != dim:
        raise RefusedError("it slices rows by an expert's number of rows, but they are not sorted by expert")
    flat = r.emit(aten.reshape.default, key, [key.numel()])
    mask = r.emit(aten.eq.Scalar, flat, members[0])
    for member in members[1:]:
        mask = r.emit(aten.logical_or.default, mask, r.emit(aten.eq.Scalar, flat, member))
    empty = (r.identities[_source(node.args[2])], tuple(members)) in r.empty
    return replace(x, domain=Domain(x.domain.size, mask, (what, *members), what, tuple(members), empty))


def _joined(r: _Resolver, node: fx.Node, parts: Sequence[Any], dim: int, size: int) -> Any:
    """Join the segments of all members in order: take each row from the segment of its member."""
    if any(not isinstance(x, SelectedRows) or x.domain.members is None or x.dim != dim for x in parts):
        raise RefusedError("it joins rows that are no segments")
    members = [m for x in parts for m in x.domain.members]
    if members != sorted(set(members)) or len({x.domain.order for x in parts}) != 1:
        raise RefusedError("it joins segments in another order")
    parts = [x for x in parts if not x.domain.empty] or parts[:1]
    result = r.lifted(parts[0])
    for x in parts[1:]:
        shape = [1] * result.ndim
        shape[dim] = size
        mask = r.emit(aten.reshape.default, x.domain.mask, shape)
        result = r.emit(aten.where.self, mask, r.lifted(x), result)
    return SelectedRows(Domain(size, order=parts[0].domain.order), result, dim)


# -- where rows are read ----------------------------------------------------------------------------------------


def index(r: _Resolver, node: fx.Node, x: Any, indices: Sequence[Any]) -> Any:
    used = [d for d, i in enumerate(indices) if i is not None]
    given = [indices[d] for d in used]
    if len(given) == 1 and isinstance(given[0], Inverse):
        if (
            not isinstance(x, SelectedRows)
            or x.domain.mask is not None
            or x.domain.order != given[0].order
            or x.dim != used[0]
        ):
            raise RefusedError("it undoes a sort by another key")
        return r.lifted(x)
    if isinstance(x, SelectedRows):
        return _index_of_rows(r, x, indices)
    if any(not isinstance(i, SelectedRows) or i.base.ndim != 1 for i in given) or used != list(
        range(used[0], used[-1] + 1)
    ):
        raise RefusedError("it looks up by selected rows and other indices together")
    domain, dim = shared(given), used[0]
    if any(i.constant is None for i in given):
        bases, at = aligned(r, given)
        return SelectedRows(domain, r.emit(aten.index.Tensor, x, [None] * dim + bases), dim, at)
    sizes = [x.shape[d] for d in used]
    at = flat_index(given, sizes)
    base = r.emit(aten.reshape.default, x, [*x.shape[:dim], prod(sizes), *x.shape[used[-1] + 1 :]])
    return SelectedRows(domain, base, dim, None if np.array_equal(at, np.arange(prod(sizes))) else at)


def index_select(r: _Resolver, node: fx.Node, x: Any, dim: int, i: Any) -> Any:
    return index(r, node, x, [*[None] * (dim % x.ndim), i])


def _index_of_rows(r: _Resolver, x: SelectedRows, indices: Sequence[Any]) -> SelectedRows:
    """Look up along dims other than that of the rows."""
    if any(isinstance(i, (SelectedRows, Inverse)) for i in indices) or (
        len(indices) > x.dim and indices[x.dim] is not None
    ):
        raise RefusedError("it selects rows of selected rows")
    used = [d for d, i in enumerate(indices) if i is not None]
    if len(used) != 1 or indices[used[0]].ndim != 1:
        raise RefusedError("it looks up by several indices")
    return replace(x, base=r.emit(aten.index.Tensor, x.base, list(indices)))


def _counts(r: _Resolver, node: fx.Node, key: Tensor, size: int, upto: bool) -> Tensor:
    """The number of elements of each member. With `upto` the result may be shorter, and only slices may use it."""
    if upto:
        return r.emit(ops.counts.default, key, size, upto)
    key = r.emit(aten.reshape.default, key, [-1, 1])
    return r.emit(aten.sum.dim_IntList, r.emit(aten.eq.Tensor, key, torch.arange(size, device=key.device)), [0])


_STARTS = {aten.argsort.default, aten.argsort.stable, aten.sort.default, aten.sort.stable}


#: of the operators that stand for routing; those of ATen have theirs in their `OpSpec`
RULES: dict[Any, Callable[..., Any]] = {
    ops.positions.default: _positions,
    ops.counts.default: _counts,
    ops.segment.default: _segment,
    ops.joined.default: _joined,
}
