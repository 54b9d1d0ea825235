"""Collect a `Snapshot` from a graph, before partition or after."""

from __future__ import annotations

import operator
from collections.abc import Mapping

from torch import fx

from ..ir import ops
from ..ir.exchange import Exchange
from ..ir.fetch import Fetch
from ..ir.layout import Layout
from ..ir.program import Program, exchanges_of, fingerprint, is_on, layout_of, specialize
from ..passes.cost import node_bytes, node_flops
from ..passes.targets import Target
from .exchanges import PlannedExchange, estimated_in, gathered_in, padding_of, planned_in, uncounted_in
from .record import CutRecord, ExchangeRecord, Kind, MessageRecord, Node, Snapshot
from .words import arguments_text, exchange_text, operator_text


def snapshot(
    program: Program,
    graph: fx.Graph,
    *,
    world: int,
    target: Target,
    cuts: Mapping[str, Layout],
    rank: int = 0,
    model: str = "",
    stage: str = "",
    strategy: str = "",
) -> Snapshot:
    """The graph of rank `rank`.

    Args:
        program: names the placeholders of `graph`, and holds the program on whole tensors.
        graph: the program's graph, or a partitioned one.

    Raises:
        ValueError: there is no such rank.
    """
    if not 0 <= rank < world:
        raise ValueError(f"there is no rank {rank}: ranks are counted from 0 to {world - 1}")
    planned = {node: some for node, some in _by_node(graph).items() if is_on(node, rank)}
    seconds = {node.name: _message_seconds(node.args[1], world, target) for node, _ in exchanges_of(graph)}  # type: ignore[arg-type]
    local = specialize(graph, rank)
    labels = program.weights | dict(zip(program.inputs, program.input_paths, strict=True))
    nodes = tuple(
        _node(source, own, rank, program, labels, planned, seconds, target)
        for source, own in zip([node for node in graph.nodes if is_on(node, rank)], local.nodes, strict=True)
    )
    gathered = gathered_in(graph)
    paths = {node.path for node in nodes}
    paths |= {path[:i] for path in paths for i, letter in enumerate(path) if letter == "."}
    return Snapshot(
        model,
        stage,
        rank,
        world,
        strategy,
        target.name,
        fingerprint(graph),
        cuts_of(program, cuts),
        nodes,
        tuple(_exchange(node, each, rank, world) for node, some in planned.items() for each in some),
        tuple(_message(node, some, world) for node, some in planned.items()),
        gathered,
        estimated_in(program.graph),
        uncounted_in(program.graph, gathered),
        {path: program.modules[path] for path in sorted(paths) if path in program.modules},
    )


def _by_node(graph: fx.Graph) -> dict[fx.Node, list[PlannedExchange]]:
    """The declared exchanges of each exchange node."""
    found: dict[fx.Node, list[PlannedExchange]] = {node: [] for node, _ in exchanges_of(graph)}
    places = list(found)
    for each in planned_in(graph):
        found[places[each.message]].append(each)
    return found


def _message_seconds(declared: tuple[Exchange, ...], world: int, target: Target) -> float:
    """Seconds of one message in an exact step, for the rank that receives most."""
    return target.message(max(sum(each.received(each.place(rank)) for each in declared) for rank in range(world)))


def _node(
    node: fx.Node,
    local: fx.Node,
    rank: int,
    program: Program,
    labels: Mapping[str, str],
    planned: Mapping[fx.Node, list[PlannedExchange]],
    seconds: Mapping[str, float],
    target: Target,
) -> Node:
    kind, launch = _kind(node, program)
    ids = tuple(each.id for each in planned[launch]) if launch is not None else ()
    if kind == "result":
        ids = (ids[node.args[1]],)  # type: ignore[index]
    operands = local.all_input_nodes
    if kind == "wait":
        operands = operands[:1]
    described = "shape" in node.meta
    work, written = (node_flops(node, rank), node_bytes(node, rank)) if kind == "operator" else (0, 0)
    took = target.compute(work, written)
    return Node(
        node.name,
        kind,
        operator_text(node.target) if node.op == "call_function" else labels.get(node.name, node.name),
        arguments_text(local, operands) if kind in ("operator", "output") else "",
        tuple(each.name for each in operands),
        node.meta.get("path", ""),
        str(node.meta.get("origin", node.name)),
        tuple(node.meta["shape"]) if described else None,
        tuple(local.meta["local_shape"]) if "local_shape" in local.meta else None,
        str(node.meta["dtype"]).removeprefix("torch.") if described else "",
        layout_of(node) if described else None,
        work,
        written,
        seconds.get(node.name, 0.0) if kind == "exchange" else took,
        ids,
    )


def _kind(node: fx.Node, program: Program) -> tuple[Kind, fx.Node | None]:
    """What a node is, and the exchange node that it belongs to."""
    if node.op == "output":
        return "output", None
    if node.op == "placeholder":
        if node.name in program.inputs:
            return "input", None
        return "weight" if node.name in program.weights else "constant", None
    if node.target is ops.exchange:
        return "exchange", node
    if node.target is ops.wait:
        return "wait", node.args[0]  # type: ignore[return-value]
    if node.target is operator.getitem:
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        if source.target is ops.wait:
            return "result", source.args[0]  # type: ignore[return-value]
        if source.target is ops.exchange:
            return "result", source
    return "operator", None


def _exchange(node: fx.Node, each: PlannedExchange, rank: int, world: int) -> ExchangeRecord:
    declared = each.declared
    awaited = next((user for user in node.users if user.target is ops.wait), node)
    result = next((u.name for u in awaited.users if u.target is operator.getitem and u.args[1] == each.value), "")
    ranks = range(world)
    return ExchangeRecord(
        each.id,
        node.name,
        node.args[0][each.value].name,  # type: ignore[index,union-attr]
        result,
        each.node,
        each.path,
        declared.role,
        declared.fresh,
        declared.may_be_stale,
        declared.reason,
        tuple(declared.shape),
        str(declared.dtype).removeprefix("torch."),
        exchange_text(declared, declared.place(rank)),
        declared.bits if isinstance(declared, Fetch) else 0,
        tuple(each.received(r) for r in ranks),
        tuple(each.received(r, exact=False) for r in ranks),
    )


def _message(node: fx.Node, planned: list[PlannedExchange], world: int) -> MessageRecord:
    declared, ranks = [each.declared for each in planned], range(world)
    return MessageRecord(
        node.name,
        tuple(each.id for each in planned),
        tuple(padding_of(declared, rank) for rank in ranks),
        tuple(padding_of(declared, rank, exact=False) for rank in ranks),
    )


def cuts_of(program: Program, cuts: Mapping[str, Layout]) -> tuple[CutRecord, ...]:
    """The values that are cut, with what the caller calls them."""
    nodes = {node.name: node for node in program.graph.nodes}
    paths = dict(zip(program.inputs, program.input_paths, strict=True))
    found: list[CutRecord] = []
    for name, layout in cuts.items():
        inside = nodes[name].meta.get("path", "")
        label = paths.get(name) or (f"{name} in {inside}" if inside else name)
        found.append(CutRecord(name, label, tuple(nodes[name].meta["shape"]), layout))
    return tuple(found)
