"""Compute the values that Python reads during recording from the real inputs, and guard them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..ir.program import Guard, fingerprint
from .errors import CaptureError
from .evaluate import run_nodes
from .guards import plain, shapes
from .recorder import Origin, Recorder

aten = torch.ops.aten


class Reader:
    """Computes the values of recorded tensors, which are fake.

    A value computed from inputs alone, or from tensors of the model alone, becomes a guard. One that mixes inputs and
    weights is an activation, which differs from call to call, and is refused.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.guards: list[Guard] = []
        self._known: set[str] = set()

    def __call__(self, node: fx.Node, shape_only: bool) -> Any:
        """Compute the real value of `node` and guard it; with `shape_only`, guard its shape only.

        Raises `CaptureError` if it depends on activations, or on an input that has no value (a fake tensor).
        """
        needed = self._needed(node)
        origins = {n: self._recorder.origins[n] for n in needed if n.op == "placeholder"}
        self._check(node, origins)
        graph = self._graph(needed, node)
        reals = {str(n.target): origin.real for n, origin in origins.items()}
        result = run_nodes(graph.nodes, {n: reals[str(n.target)] for n in graph.find_nodes(op="placeholder")})
        sources = [origin.name for origin in origins.values() if origin.name]
        if sources:
            value = shapes(result) if shape_only else plain(result)
            self._add(_guard(", ".join(sources), value, self._recorder, graph, origins, shape_only))
        return result

    def value(self, node: fx.Node) -> Any:
        """The real value of `node` in this call, without a guard; None if weights or values that are fake decide it."""
        needed = self._needed(node)
        origins = {n: self._recorder.origins[n] for n in needed if n.op == "placeholder"}
        if any(origin.kind == "weight" or origin.real is None for origin in origins.values()):
            return None
        graph = self._graph(needed, node)
        reals = {str(n.target): origin.real for n, origin in origins.items()}
        return run_nodes(graph.nodes, {n: reals[str(n.target)] for n in graph.find_nodes(op="placeholder")})

    def is_activation(self, node: fx.Node) -> bool:
        """Whether the value of `node` mixes inputs and weights."""
        return {"input", "weight"} <= self._kinds(node)

    def is_constant(self, node: fx.Node) -> bool:
        """Whether the value of `node` is computed without inputs and weights."""
        return self._kinds(node) <= {"constant", "fresh"}

    def _kinds(self, node: fx.Node) -> set[str]:
        return {self._recorder.origins[n].kind for n in self._needed(node) if n.op == "placeholder"}

    def _add(self, guard: Guard) -> None:
        """Add a guard, unless an equal one exists: the blocks of a model may read the same value."""
        assert guard.graph is not None
        key = fingerprint(guard.graph)
        if key not in self._known:
            self._known.add(key)
            self.guards.append(guard)

    def _check(self, node: fx.Node, origins: dict[fx.Node, Origin]) -> None:
        line = self._recorder.current_line()
        kinds = {origin.kind for origin in origins.values()}
        what = f"{node.target} at {line}"
        if {"input", "weight"} <= kinds:
            names = ", ".join(o.name for o in origins.values() if o.kind == "input")
            raise CaptureError(
                f"{what} needs the value of an activation (computed from {names} and weights), which no fixed "
                "graph can follow; keep it a tensor (torch.where) or pass the decision in as an argument"
            )
        missing = [origin.name or "a constant" for origin in origins.values() if origin.real is None]
        if missing:
            raise CaptureError(f"{what} needs the value of {', '.join(missing)}, which is fake; give a real tensor")

    def _graph(self, needed: list[fx.Node], node: fx.Node) -> fx.Graph:
        """A graph that computes `node`; placeholders that it writes to are cloned first."""
        written = {m for each in needed if each in self._recorder.writes for m in memory_of(each.meta["val"])}
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for each in needed:
            copies[each] = graph.node_copy(each, copies.__getitem__)
            copies[each].meta = {}
            if each.op == "placeholder" and written & set(memory_of(each.meta["val"])):
                copies[each] = graph.call_function(aten.clone.default, (copies[each],))
        graph.output(copies[node])
        return graph

    def _needed(self, target: fx.Node) -> list[fx.Node]:
        """The nodes that must run to compute `target`, in order: its ancestors and earlier writes to their memory."""
        needed: set[fx.Node] = set()
        memory: set[int] = set()
        writes = [(w, memory_of(w.meta["val"])) for w in self._recorder.writes]
        stack = [target]
        while stack:
            node = stack.pop()
            if node not in needed:
                needed.add(node)
                memory.update(memory_of(node.meta["val"]))
                stack.extend(node.all_input_nodes)
            if not stack:
                writes = [(w, at) for w, at in writes if w not in needed]
                stack = [w for w, at in writes if not memory.isdisjoint(at)]
        return [node for node in self._recorder.graph.nodes if node in needed]


def memory_of(value: Any) -> list[int]:
    """The storages of a fake value."""
    tensors = value if isinstance(value, (tuple, list)) else [value]
    return [t.untyped_storage()._cdata for t in tensors if isinstance(t, Tensor)]


def _guard(
    path: str,
    value: Any,
    recorder: Recorder,
    graph: fx.Graph,
    origins: dict[fx.Node, Origin],
    shape_only: bool,
) -> Guard:
    held = {str(n.target): o.name for n, o in origins.items() if o.kind != "input" and o.name}
    constants = {str(n.target): o.real for n, o in origins.items() if not o.name and o.real is not None}
    return Guard(path, value, recorder.current_line(), graph, held, constants, shape_only)
