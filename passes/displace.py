"""displace: by the strategy, exchanges of a displaced step use what the others sent at an earlier step (law 4).

A step's own part is always fresh. Which exchanges may be displaced is said by the rules that declare them.
What depends on the conditioning alone is the same at every step: it travels at exact steps only, and stays exact.

After a stale exchange, the ranks' copies of a value that several of them hold (replicated text, overlapping rows)
differ. Copies of the outputs must not, nor copies of integers and booleans, because these decide something: there each
row is taken from one rank, its owner.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import fx

from ..ir import ops
from ..ir.exchange import Exchange, Freshness
from ..ir.fetch import Fetch
from ..ir.layout import full, owned
from ..ir.nodes import append_copy
from ..ir.program import layout_of, shape_of
from ..ir.strategy import Strategy

_view = torch.ops.aten.view.default


def displace(graph: fx.Graph, strategy: Strategy, inputs: Collection[str], world: int) -> fx.Graph:
    """Declare how fresh each exchange is, and give what ranks would disagree on one owner.

    Args:
        inputs: the placeholders of the inputs that move from step to step.
    """
    result = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    moving = _moving(graph, inputs)
    differing: set[fx.Node] = set()  # nodes of the result of which ranks may hold differing copies
    for node in graph.nodes:
        if node.op == "output":
            values = [_agreed(result, env[v], world, "output") if env[v] in differing else env[v] for v in node.args[0]]
            result.output(type(node.args[0])(values))
            continue
        new = env[node] = append_copy(result, node, env.__getitem__)
        if node.target is ops.exchange:
            declared = _displaced(node.args[1], strategy, steady=node not in moving)  # type: ignore[arg-type]
            new.args = (new.args[0], declared)
        if not _differs(new, node in moving, differing):
            continue
        differing.add(new)
        if "dtype" in node.meta and not node.meta["dtype"].is_floating_point and not node.meta["dtype"].is_complex:
            env[node] = _agreed(result, new, world, "small")
    return result


def _differs(node: fx.Node, moves: bool, differing: Collection[fx.Node]) -> bool:
    """Whether ranks may hold differing copies of a node of the result, for another reason than rounding."""
    if node.target is operator.getitem and node.args[0].target is ops.exchange:  # type: ignore[union-attr]
        source, place = node.args
        exchange: Exchange = source.args[1][place]  # type: ignore[union-attr,index]
        if exchange.fresh != "sync":
            return moves
        return not exchange.agrees and source.args[0][place] in differing  # type: ignore[union-attr,index]
    return any(source in differing for source in node.all_input_nodes)


def _moving(graph: fx.Graph, inputs: Collection[str]) -> set[fx.Node]:
    """The nodes that depend on one of `inputs`."""
    moving: set[fx.Node] = set()
    for node in graph.nodes:
        if node.name in inputs or any(source in moving for source in node.all_input_nodes):
            moving.add(node)
    return moving


def _displaced(message: tuple[Exchange, ...], strategy: Strategy, *, steady: bool) -> tuple[Exchange, ...]:
    """The exchanges of one message: displaced if their rules allow it for all of them."""
    if not all(each.may_be_stale for each in message):
        return message
    fresh: list[Freshness] = [strategy.freshness(each.role) for each in message]
    if steady:
        return tuple(
            replace(each, fresh="sync" if how == "sync" else "frozen") for each, how in zip(message, fresh, strict=True)
        )
    return tuple(_told(each, how, strategy) for each, how in zip(message, fresh, strict=True))


def _told(exchange: Exchange, fresh: Freshness, strategy: Strategy) -> Exchange:
    """The exchange of displaced steps: how fresh, how much of a change goes on, and in how many bits it is sent."""
    exchange = replace(exchange, fresh=fresh, forecast=strategy.forecast if _forecast(exchange, fresh) else 0.0)
    if not isinstance(exchange, Fetch) or fresh == "sync":
        return exchange
    coded = fresh == "stale" and len(exchange.shape) > 1
    # no owners: a rank uses all rows that it computed itself, because these are fresh
    return replace(exchange, owners=(), bits=strategy.bits if coded else 0)


def _forecast(exchange: Exchange, fresh: Freshness) -> bool:
    """Whether changes of the exchange are expected to go on: measured, that helps for halos and moments.

    Keys and values pass a softmax, which turns small errors of what is large into other choices; theirs is not. A
    signal of one dim has no samples, of each of which a trend would be measured.
    """
    return fresh == "predicted" or (fresh == "stale" and exchange.role == "halo" and len(exchange.shape) > 1)


def _agreed(graph: fx.Graph, node: fx.Node, world: int, role: str) -> fx.Node:
    """`node` with every row that several ranks hold taken from one of them."""
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
    fetch = Fetch(role, shape, node.meta["dtype"], world, reason, dim, rows, rows, owners=owners)  # type: ignore[arg-type]
    sent = graph.call_function(ops.exchange, ((node,), (fetch,)))
    sent.meta = {key: value for key, value in node.meta.items() if key not in ("shape", "dtype", "layout", "val")}
    return _emit(graph, node, operator.getitem, (sent, 0), shape)


def _emit(graph: fx.Graph, like: fx.Node, target: object, args: tuple[object, ...], shape: tuple[int, ...]) -> fx.Node:
    new = graph.call_function(target, args)  # type: ignore[arg-type]
    new.meta = like.meta | {"shape": shape}
    return new
