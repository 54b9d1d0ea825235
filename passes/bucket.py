"""bucket: merge exchanges that are ready together into one message (K and V; all outputs), in memory order. Exact.

Equal exchanges are one node already, because `partition` emits each operator on each value once.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from ..ir import ops
from ..ir.fetch import Fetch
from ..ir.nodes import append, append_copy
from ..ir.program import shape_of


@dataclass
class _Group:
    """Exchanges that can be one message: all operands are ready before the first result is used."""

    ready: int
    needed: int
    members: list[fx.Node] = field(default_factory=list)


def bucket(graph: fx.Graph) -> fx.Graph:
    """Merge exchanges of one role and freshness that do not depend on each other.

    A merged exchange is placed where its last operand is ready.
    """
    position = {node: i for i, node in enumerate(graph.nodes)}
    due: dict[int, list[_Group]] = {}
    for group in _groups(graph, position):
        due.setdefault(group.ready, []).append(group)
    result = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.target is not ops.exchange and not _is_result(node):
            env[node] = append_copy(result, node, env.__getitem__)
        for group in due.get(position[node], ()):
            _emit(result, group, env)
    result.lint()
    return result


def _is_result(node: fx.Node) -> bool:
    """Whether the node is one result of an exchange."""
    return node.target is operator.getitem and node.args[0].target is ops.exchange


def _groups(graph: fx.Graph, position: dict[fx.Node, int]) -> list[_Group]:
    groups: list[_Group] = []
    last: dict[tuple[str, str], _Group] = {}
    for node in graph.nodes:
        if node.target is not ops.exchange:
            continue
        values, declared = node.args
        ready = max(position[value] for value in values)
        # an exchange of the result counts as a use where its operand is: the result itself
        needed = min(
            position[item if user.target is ops.exchange else user] for item in node.users for user in item.users
        )
        kind = declared[0].role, declared[0].fresh
        group = last.get(kind)
        if group is None or max(group.ready, ready) >= min(group.needed, needed):
            group = last[kind] = _Group(ready, needed)
            groups.append(group)
        group.ready, group.needed = max(group.ready, ready), min(group.needed, needed)
        group.members.append(node)
    return groups


def _emit(result: fx.Graph, group: _Group, env: dict[fx.Node, fx.Node]) -> None:
    values = [env[value] for node in group.members for value in node.args[0]]  # type: ignore[union-attr,index]
    declared: tuple[Any, ...] = tuple(
        replace(exchange, order=order) if isinstance(exchange, Fetch) and (order := order_of(value)) else exchange
        for node in group.members
        for value, exchange in zip(*node.args, strict=True)
    )
    merged = append(result, ops.exchange, (tuple(values), declared), meta=group.members[0].meta)
    offset = 0
    for node in group.members:
        for item in node.users:
            index = offset + item.args[1]  # type: ignore[operator]
            env[item] = append(result, operator.getitem, (merged, index), meta=item.meta)
        offset += len(node.args[1])  # type: ignore[arg-type]


def order_of(value: fx.Node) -> tuple[int, ...]:
    """The dims of a transposed view in memory order, outermost first; () for other values."""
    if value.target is not torch.ops.aten.permute.default:
        return ()
    dims = [dim % len(shape_of(value)) for dim in value.args[1]]  # type: ignore[union-attr]
    return tuple(dims.index(place) for place in range(len(dims)))
