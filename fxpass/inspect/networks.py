"""A snapshot as a networkx graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .record import Node, Snapshot

if TYPE_CHECKING:
    import networkx as nx


def to_networkx(snapshot: Snapshot) -> nx.DiGraph[str]:
    """The graph of the rank: a networkx node for each node, by name, and an edge for each value that one reads.

    `docs/inspect.md` documents the attributes. Raises `MissingExtraError` if networkx is not installed.
    """
    try:
        import networkx
    except ModuleNotFoundError as error:
        from ..extras import missing

        raise missing(error) or error from None
    result: nx.DiGraph[str] = networkx.DiGraph(
        model=snapshot.model,
        stage=snapshot.stage,
        rank=snapshot.rank,
        world=snapshot.world,
        strategy=snapshot.strategy,
        target=snapshot.target,
        fingerprint=snapshot.fingerprint,
    )
    for node in snapshot.nodes:
        result.add_node(node.name, **_attributes(node, snapshot))
    for node in snapshot.nodes:
        for name in node.operands:
            if name in snapshot.by_name:
                result.add_edge(name, node.name, seconds=snapshot.by_name[name].seconds)
    return result


def _attributes(node: Node, snapshot: Snapshot) -> dict[str, Any]:
    found: dict[str, Any] = {
        "kind": node.kind,
        "operator": node.operator,
        "path": node.path,
        "origin": node.origin,
        "shape": node.shape,
        "local": node.local,
        "dtype": node.dtype,
        "split": node.layout.dim if node.layout is not None else None,
        "flops": node.flops,
        "bytes": node.bytes,
        "seconds": node.seconds,
        "exchanges": node.exchanges,
    }
    if node.kind != "exchange":
        return found
    message = snapshot.message_of[node.name]
    some = {each: snapshot.by_id[each] for each in node.exchanges}
    return found | {
        "role": next(iter(some.values())).role,
        "fresh": next(iter(some.values())).fresh,
        "exact": {name: each.exact for name, each in some.items()},
        "steady": {name: each.steady for name, each in some.items()},
        "received": sum(each.exact[snapshot.rank] for each in some.values()),
        "received_steady": sum(each.steady[snapshot.rank] for each in some.values()),
        "padding": message.padding[snapshot.rank],
        "padding_steady": message.padding_steady[snapshot.rank],
    }
