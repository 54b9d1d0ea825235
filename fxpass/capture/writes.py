"""Replace in-place writes by new values, so that every node of the recorded graph is a pure function.

Each tensor that shares written memory is a chain of views from a *base*. A write to one of them makes a new value for
it and, backwards along its chain, a new base. A later read of any of them replays its chain on the newest base.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.nodes import append_copy
from . import kinds
from .concrete import memory_of
from .errors import CaptureError
from .recorder import Recorder, argument

aten = torch.ops.aten


@dataclass
class _Base:
    value: Tensor  #: newest, a fake tensor of the new recorder
    version: int = 0


@dataclass
class _Alias:
    """A tensor that shares written memory: `base` after the chain of `views`."""

    base: _Base
    views: tuple[fx.Node, ...]  #: nodes of the old graph; each takes the one before (a getitem takes a list of views)
    read: Any = None
    version: int = -1


def functionalize(old: Recorder, results: list[fx.Node]) -> tuple[Recorder, list[fx.Node]]:
    """A recorder with an equal graph of pure operators, and its results; `old` itself if nothing writes in place.

    The result for an input that is written to is its last value. Raises `CaptureError` where a weight, buffer or
    attribute is written to.
    """
    if not old.writes:
        return old, results
    written = {m for node in old.writes for m in memory_of(_target(node).meta["val"])}
    for node, origin in old.origins.items():
        if origin.kind not in ("fresh", "input") and written & set(memory_of(node.meta["val"])):
            write = next(
                w for w in old.writes if set(memory_of(_target(w).meta["val"])) & set(memory_of(node.meta["val"]))
            )
            raise CaptureError(
                f"the model changes its own state in place: {origin.name or 'a tensor'} at {write.meta['trace']}; "
                "make a copy first, or return the new value"
            )
    with torch._C._AutoDispatchBelowAutograd():
        return _Rewriter(old, written).run(results)


def _target(write: fx.Node) -> fx.Node:
    """The operand that an in-place operator writes to."""
    op: Any = write.target
    names = kinds.written_arguments(op)
    target = argument(op, write.args, write.kwargs, names[0], None) if len(names) == 1 else None
    if not isinstance(target, fx.Node):
        raise CaptureError(
            f"{op} at {write.meta['trace']} writes to several tensors at once; use the form that returns new ones"
        )
    return target


class _Rewriter:
    def __init__(self, old: Recorder, written: set[int]) -> None:
        self._old = old
        self._written = written
        self._new = Recorder(old.fake_mode, {})
        self._aliases: dict[fx.Node, _Alias] = {}
        self._values: dict[fx.Node, Any] = {}  #: old node -> fake value, of tensors that nobody writes to

    def run(self, results: list[fx.Node]) -> tuple[Recorder, list[fx.Node]]:
        for node in self._old.graph.nodes:
            self._new.path, self._new.line = node.meta["path"], node.meta["trace"]
            if node.op == "placeholder":
                copy = append_copy(self._new.graph, node)
                self._new.origins[copy] = self._old.origins[node]
                self._new.register(node.meta["val"], copy)
                self._hold(node)
            elif node in self._old.writes:
                self._write(node)
            else:
                self._copy(node)
        return self._new, [self._new.node(self._read(node)) for node in results]

    def _copy(self, node: fx.Node) -> None:
        """Copy an operator that writes nothing; a view of written memory becomes an alias."""
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        shared = bool(self._written & set(memory_of(node.meta["val"])))
        if shared and source in self._aliases and (node.target is operator.getitem or kinds.aliases(node.target)):
            alias = self._aliases[source]
            self._aliases[node] = _Alias(alias.base, (*alias.views, node))
            return
        value = node.meta["val"]
        copy = append_copy(self._new.graph, node, lambda n: self._new.node(self._read(n)))
        self._new.register(value, copy)
        self._hold(node)

    def _hold(self, node: fx.Node) -> None:
        """Store a value that is no view: if its memory is written to, it is the base of its views."""
        value = node.meta["val"]
        if self._written & set(memory_of(value)) and isinstance(value, Tensor):
            self._aliases[node] = _Alias(_Base(value), ())
        else:
            self._values[node] = value

    def _run(self, op: Any, args: Any, kwargs: Any) -> Any:
        with self._new:
            return op(*args, **kwargs)

    def _read(self, node: fx.Node) -> Any:
        """The present value of an old node."""
        if node not in self._aliases:
            return self._values[node]
        alias = self._aliases[node]
        if alias.version != alias.base.version:
            *_, alias.read = self._replay(alias)
            alias.version = alias.base.version
        return alias.read

    def _replay(self, alias: _Alias) -> list[Any]:
        """The base, and the value after each view of the chain."""
        values: list[Any] = [alias.base.value]
        for view in alias.views:
            if view.target is operator.getitem:
                values.append(values[-1][view.args[1]])
            else:
                op = aten.reshape.default if view.target is aten.view.default else view.target  # strides may differ
                values.append(self._run(op, (values[-1], *view.args[1:]), view.kwargs))
        return values

    def _write(self, node: fx.Node) -> None:
        target = _target(node)
        new = self._pure(node, target)
        alias = self._aliases[target]
        values = self._replay(alias)
        parents = list(zip(alias.views, values[:-1], strict=True))
        while parents:
            view, before = parents.pop()
            if view.target is operator.getitem:
                view_of, before = parents.pop()
                new = self._run(*_undo_part(view_of, view.args[1], before, new))  # type: ignore[arg-type]
            else:
                new = self._run(*_undo(view, before, new))
        alias.base.value = new
        alias.base.version += 1
        self._aliases[node] = alias  # an in-place operator returns what it wrote to

    def _pure(self, node: fx.Node, target: fx.Node) -> Tensor:
        """Compute the value that an in-place operator writes."""
        op: Any = node.target
        like: Tensor = target.meta["val"]
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._read)
        if op is aten.copy_.default:
            value = args[1]
        elif op is aten.zero_.default:
            value = self._run(aten.full_like.default, (args[0], 0), {})
        elif op is aten.fill_.Scalar:
            value = self._run(aten.full_like.default, (args[0], args[1]), {})
        elif op is aten.fill_.Tensor:
            value = args[1]
        elif kinds.has_functional_form(op):
            value = self._functional(op, args, kwargs)
        else:
            raise CaptureError(f"{op} at {node.meta['trace']} writes in place and has no functional form")
        if value.dtype != like.dtype:
            value = self._run(aten._to_copy.default, (value,), {"dtype": like.dtype})
        if value.device != like.device:
            value = self._run(aten._to_copy.default, (value,), {"device": like.device})
        if value.shape != like.shape:
            value = self._run(aten.expand.default, (value, list(like.shape)), {})
        return value

    def _functional(self, op: Any, args: Any, kwargs: Any) -> Tensor:
        """Run an in-place operator by its functional form, which torch's functionalization kernels know."""
        args, kwargs = torch.utils._pytree.tree_map_only(Tensor, torch._to_functional_tensor, (args, kwargs))
        (name,) = kinds.written_arguments(op)
        target = argument(op, args, kwargs, name, None)
        self._run(op, args, kwargs)
        torch._sync(target)
        return torch._from_functional_tensor(target)


_SCATTERS: dict[Any, Any] = {
    aten.select: aten.select_scatter.default,
    aten.slice: aten.slice_scatter.default,
    aten.diagonal: aten.diagonal_scatter.default,
}
_RESHAPES = {aten.view, aten._unsafe_view, aten._reshape_alias, aten.unsqueeze, aten.squeeze}


def _undo(view: fx.Node, before: Tensor, new: Tensor) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The operator that replaces the part of `before` that `view` selects by `new`."""
    args = view.args[1:]
    packet = view.target.overloadpacket
    if packet in _SCATTERS:
        return _SCATTERS[packet], (before, new, *args), {}
    if packet in _RESHAPES:
        return aten.reshape.default, (new, list(before.shape)), {}
    if packet is aten.permute:
        order: list[int] = [d % before.ndim for d in args[0]]  # type: ignore[union-attr]
        return aten.permute.default, (new, [order.index(d) for d in range(before.ndim)]), {}
    if packet in (aten.transpose, aten.t):
        return view.target, (new, *args), {}
    raise CaptureError(
        f"a write at {view.meta['trace']} goes through {view.target}, which cannot be undone; copy first"
    )


def _undo_part(view: fx.Node, index: int, before: Tensor, new: Tensor) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The same for one of the views that `split` and `unbind` return."""
    args = view.args[1:] if view.target.overloadpacket is aten.unbind else view.args[2:]
    dim = args[0] if args else view.kwargs.get("dim", 0)
    if view.target.overloadpacket is aten.unbind:
        return aten.select_scatter.default, (before, new, dim, index), {}
    sizes = [part.shape[dim] for part in view.meta["val"]]
    start = sum(sizes[:index])
    return aten.slice_scatter.default, (before, new, dim, start, start + sizes[index]), {}
