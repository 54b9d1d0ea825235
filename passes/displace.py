"""displace: set how fresh each exchange is at displaced steps, by the strategy (law 4).

A stale exchange uses the rank's own part of this step and the other ranks' parts of an earlier step. Rules say which
exchanges may be stale. Values that depend on the conditioning alone are the same at every step: they are sent at exact
steps only and stay exact.

After a stale exchange, ranks may hold different copies of the same row (replicated text, overlapping rows). The pass
makes copies of outputs, integers and booleans equal: an added exchange takes each row from one rank, its owner.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ..ir import ops
from ..ir.exchange import Exchange, Freshness, Role
from ..ir.fetch import Fetch
from ..ir.layout import full, owned
from ..ir.nodes import append_copy
from ..ir.program import layout_of, shape_of
from ..ir.strategy import Strategy

_view = torch.ops.aten.view.default


def displace(graph: fx.Graph, strategy: Strategy, inputs: Collection[str], world: int) -> fx.Graph:
    """Set how fresh each exchange is, and make differing copies of outputs, integers and booleans equal.

    Args:
        inputs: names of the placeholders whose values change from step to step.
    """
    result = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    moving = depending(graph, inputs)
    differing: set[fx.Node] = set()  # nodes of the result whose copies may differ between ranks
    for node in graph.nodes:
        if node.op == "output":
            values = [_agreed(result, env[v], world, "output") if env[v] in differing else env[v] for v in node.args[0]]
            result.output(type(node.args[0])(values))
            continue
        new = env[node] = append_copy(result, node, env.__getitem__)
        if node.target is ops.exchange:
            declared = displaced(node.args[1], strategy, steady=node not in moving)
            new.args = (new.args[0], declared)
        if not _differs(new, node in moving, differing):
            continue
        differing.add(new)
        if "dtype" in node.meta and not node.meta["dtype"].is_floating_point and not node.meta["dtype"].is_complex:
            env[node] = _agreed(result, new, world, "small")
    return result


def _differs(node: fx.Node, moves: bool, differing: Collection[fx.Node]) -> bool:
    """Whether the ranks' copies of a node of the result may differ by more than rounding."""
    if node.target is operator.getitem and node.args[0].target is ops.exchange:
        source, place = node.args
        exchange: Exchange = source.args[1][place]  # type: ignore[union-attr,index]
        if exchange.fresh != "sync":
            return moves
        return not exchange.agrees and source.args[0][place] in differing  # type: ignore[union-attr,index]
    return any(source in differing for source in node.all_input_nodes)


def depending(graph: fx.Graph, inputs: Collection[str]) -> set[fx.Node]:
    """The nodes that depend on one of `inputs`."""
    moving: set[fx.Node] = set()
    for node in graph.nodes:
        if node.name in inputs or any(source in moving for source in node.all_input_nodes):
            moving.add(node)
    return moving


def displaced(message: tuple[Exchange, ...], strategy: Strategy, *, steady: bool) -> tuple[Exchange, ...]:
    """The exchanges of one message, made stale if the rules of all of them allow it.

    Args:
        steady: the operands are the same at every step.
    """
    if not all(each.may_be_stale for each in message):
        return message
    fresh: list[Freshness] = [strategy.freshness(each.role) for each in message]
    if steady:
        return tuple(
            replace(each, fresh="sync" if how == "sync" else "frozen") for each, how in zip(message, fresh, strict=True)
        )
    return tuple(_with_freshness(each, how, strategy) for each, how in zip(message, fresh, strict=True))


def _with_freshness(exchange: Exchange, fresh: Freshness, strategy: Strategy) -> Exchange:
    """The exchange with its freshness, and with the forecast and the bits of coding that the strategy has for it."""
    exchange = replace(exchange, fresh=fresh, forecast=strategy.forecast if _forecast(exchange, fresh) else 0.0)
    if not isinstance(exchange, Fetch) or fresh == "sync":
        return exchange
    coded = fresh == "stale" and len(exchange.shape) > 1
    # no owners: a rank uses all rows that it computed itself, because these are fresh
    return replace(exchange, owners=(), bits=strategy.bits if coded else 0)


def _forecast(exchange: Exchange, fresh: Freshness) -> bool:
    """Whether to extrapolate the last change. Measured: it improves halos and moments, and worsens keys and values.

    A softmax amplifies small errors of large scores. Values of one dim have no sample dim, and trends are per sample.
    """
    return fresh == "predicted" or (fresh == "stale" and exchange.role == "halo" and len(exchange.shape) > 1)


def _agreed(graph: fx.Graph, node: fx.Node, world: int, role: Role) -> fx.Node:
    """Exchange `node` so that each row that several ranks hold is taken from its owner."""
    layout, shape = layout_of(node), shape_of(node)
    if not shape:
        node = _emit(graph, node, _view, (node, [1]), (1,))
        node = _agreed(graph, node, world, role)
        return _emit(graph, node, _view, (node, []), ())
    dim = layout.axis if layout.split else max(range(len(shape)), key=shape.__getitem__)
    rows = layout.rows if layout.split else full(shape[dim], world)
    owners = owned(rows)
    if owners == rows:
        return node
    reason = "ranks may differ after stale exchanges"
    fetch = Fetch(role, shape, node.meta["dtype"], world, reason, dim, rows, rows, owners=owners)
    args: Any = (node,), (fetch,)
    sent = graph.call_function(ops.exchange, args)
    sent.meta = {key: value for key, value in node.meta.items() if key not in ("shape", "dtype", "layout", "val")}
    return _emit(graph, node, operator.getitem, (sent, 0), shape)


def _emit(graph: fx.Graph, like: fx.Node, target: object, args: tuple[object, ...], shape: tuple[int, ...]) -> fx.Node:
    new = graph.call_function(target, args)  # type: ignore[arg-type]
    new.meta = like.meta | {"shape": shape}
    return new
