"""Cost of a graph, by which the search for cuts judges: floating-point operations, memory traffic and time per rank.

The model is simple: all work at the rate of large operators, all exchanges in sequence. `fxpass.predict` simulates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

from torch import fx

from ..ir.operators import spec_of
from ..ir.program import calls, exchanges_of, layout_of
from .targets import Target


def _local(node: fx.Node, rank: int) -> Any:
    return layout_of(node).local_shape(node.meta["shape"], rank) if "shape" in node.meta else ()


def node_flops(node: fx.Node, rank: int = 0) -> int:
    """Floating-point operations of one node on one rank; 0 where they are unknown or not worth counting."""
    count = spec_of(node.target).flops
    if count is None:
        return node.meta.get("flops") or 0
    args = fx.node.map_arg(node.args, lambda n: _Shape(_local(n, rank)))
    return count(_local(node, rank), *args)


class _Shape(tuple[int, ...]):
    """The shape of an operand (`map_arg` would descend into a plain tuple)."""


def node_bytes(node: fx.Node, rank: int = 0) -> int:
    """Bytes that one node writes on one rank; it reads about as many."""
    if spec_of(node.target).free or "dtype" not in node.meta:
        return 0
    return prod(_local(node, rank)) * node.meta["dtype"].itemsize


def alike(nodes: Iterable[fx.Node], world: int) -> tuple[int, ...]:
    """For each rank, the first rank that has as many rows of each of these values."""
    layouts = dict.fromkeys(map(layout_of, nodes))
    return _alike(tuple(layout.sizes for layout in layouts if layout.dim is not None), world)


@lru_cache(maxsize=4096)
def _alike(sizes: tuple[tuple[int, ...], ...], world: int) -> tuple[int, ...]:
    if not sizes:
        return (0,) * world
    first: dict[tuple[int, ...], int] = {}
    rows = [tuple(each[rank % len(each)] for each in sizes) for rank in range(world)]  # groups of a mesh are alike
    return tuple(first.setdefault(each, rank) for rank, each in enumerate(rows))


def flops(graph: fx.Graph, rank: int = 0) -> int:
    """Floating-point operations of one rank; of the whole model if the graph is not partitioned."""
    return sum(node_flops(node, rank) for node in calls(graph))


def totals(graph: fx.Graph, world: int, *figures: Callable[[fx.Node, int], int]) -> list[tuple[int, ...]]:
    """The sums of some figures of nodes (`node_flops`, `node_bytes`) over a graph, each for every rank."""
    #: ranks alike, and where the nodes are placed -> of the first of each kind: the sums
    groups: dict[tuple[Any, ...], dict[int, list[int]]] = {}
    for node in calls(graph):
        key = first, _ = alike((node, *node.all_input_nodes), world), node.meta.get("placed")
        if key not in groups:
            groups[key] = {rank: [0] * len(figures) for rank in first}
        for rank, sums in groups[key].items():
            for i, figure in enumerate(figures):
                sums[i] += figure(node, rank)
    each = [
        [found[first[rank]] for (first, placed), found in groups.items() if placed is None or rank in placed]
        for rank in range(world)
    ]
    return [tuple(sum(sums[i] for sums in own) for own in each) for i in range(len(figures))]


@dataclass(frozen=True)
class Cost:
    """Seconds of computation on the slowest rank, and of all exchanges in sequence."""

    compute: float
    exchange: float
    flops_per_rank: tuple[int, ...]
    received: int  #: bytes in an exact step, by the rank that receives most

    @property
    def seconds(self) -> float:
        return self.compute + self.exchange


def exchange_cost(graph: fx.Graph, world: int, target: Target) -> tuple[float, int]:
    """Seconds of all exchanges in sequence, and the bytes of the rank that receives most."""
    seconds, totals = 0.0, [0] * world
    for _, declared in exchanges_of(graph):
        received = [sum(e.received(rank) for e in declared) for rank in range(world)]
        seconds += target.message(max(received))
        totals = [total + count for total, count in zip(totals, received, strict=True)]
    return seconds, max(totals)


def cost(graph: fx.Graph, world: int, target: Target, shares: Sequence[float] = ()) -> Cost:
    """
    Args:
        shares: of each rank, the speed at which it computes; default: that of the target.
    """
    work, traffic = totals(graph, world, node_flops, node_bytes)
    speeds = shares or (1.0,) * world
    compute = max(target.compute(w, t) / speed for w, t, speed in zip(work, traffic, speeds, strict=True))
    seconds, received = exchange_cost(graph, world, target)
    return Cost(compute, seconds, work, received)
