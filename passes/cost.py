"""What a graph costs: floating-point operations, memory traffic and time on each rank, under a simple machine model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from ..ir import ops
from ..ir.program import calls, exchanges_of, layout_of

aten = torch.ops.aten
Shape = Sequence[int]


@dataclass(frozen=True)
class Target:
    """A machine, roughly: what the seed search weighs computing against communication with."""

    name: str
    flops: float  #: of matrix products, per second and rank
    memory: float  #: bytes per second read and written by everything else
    link: float  #: bytes per second received by a rank
    latency: float  #: seconds that an exchange takes however small it is


TARGETS = {
    "cpu": Target("cpu", flops=6e10, memory=8e9, link=2e9, latency=2e-4),
    "gpu": Target("gpu", flops=3e14, memory=1.5e12, link=1e11, latency=2e-5),
}


def _convolution(out: Shape, x: Shape, weight: Shape, *rest: Any) -> int:
    transposed = rest[4]
    positions = prod(x[2:]) * x[0] * x[1] if transposed else prod(out)
    return 2 * positions * prod(weight[1:])


def _linear(out: Shape, x: Shape, weight: Shape, *_: Any) -> int:
    return 2 * prod(out) * x[-1]


def _product(out: Shape, a: Shape, b: Shape, *_: Any) -> int:
    return 2 * prod(out) * a[-1]


def _product_plus(out: Shape, added: Shape, a: Shape, b: Shape, *_: Any) -> int:
    return 2 * prod(out) * a[-1]


def _einsum(out: Shape, equation: str, operands: Sequence[Shape], *_: Any) -> int:
    words = equation.split("->")[0].split(",")
    sizes = {
        letter: n for word, shape in zip(words, operands, strict=True) for letter, n in zip(word, shape, strict=True)
    }
    return 2 * prod(sizes.values()) if len(words) > 1 else 0


def _attention(out: Shape, query: Shape, key: Shape, value: Shape, *_: Any) -> int:
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


#: operators that count as work: matrix products, convolutions, attention; arguments are (out, *operands)
FLOPS: dict[Any, Callable[..., int]] = {
    aten.convolution.default: _convolution,
    aten.linear.default: _linear,
    aten.mm.default: _product,
    aten.bmm.default: _product,
    aten.matmul.default: _product,
    aten.addmm.default: _product_plus,
    aten.baddbmm.default: _product_plus,
    aten.einsum.default: _einsum,
    aten._int_mm.default: _product,
    aten._weight_int8pack_mm.default: _product,
    aten.cdist.default: _product,
    aten.scaled_dot_product_attention.default: _attention,
}

#: operators that move no memory
FREE = {
    aten.reshape.default,
    aten.permute.default,
    aten.expand.default,
    aten.slice.Tensor,
    ops.take,
    ops.exchange,
    ops.wait,
}


def _local(node: fx.Node, rank: int) -> Any:
    return layout_of(node).local_shape(node.meta["shape"], rank) if "shape" in node.meta else ()


def node_flops(node: fx.Node, rank: int = 0) -> int:
    """Floating-point operations of one node on one rank."""
    count = FLOPS.get(node.target)
    if count is None:
        return 0
    args = fx.node.map_arg(node.args, lambda n: _Shape(_local(n, rank)))
    return count(_local(node, rank), *args)


class _Shape(tuple[int, ...]):
    """A shape in the place of an operand (`map_arg` would enter a plain tuple)."""


def node_bytes(node: fx.Node, rank: int = 0) -> int:
    """Bytes written by one node on one rank; about as many are read."""
    if node.target in FREE or "dtype" not in node.meta:
        return 0
    return prod(_local(node, rank)) * node.meta["dtype"].itemsize


def flops(graph: fx.Graph, rank: int = 0) -> int:
    """Floating-point operations of a rank; of a graph that is not partitioned: of the model."""
    return sum(node_flops(node, rank) for node in calls(graph))


@dataclass(frozen=True)
class Cost:
    """Seconds of the slowest rank's computing, and of all exchanges one after the other."""

    compute: float
    exchange: float
    flops_per_rank: tuple[int, ...]

    @property
    def seconds(self) -> float:
        return self.compute + self.exchange


def exchange_seconds(graph: fx.Graph, world: int, target: Target) -> float:
    total = 0.0
    for _, declared in exchanges_of(graph):
        total += target.latency + max(sum(e.received(r) for e in declared) for r in range(world)) / target.link
    return total


def cost(graph: fx.Graph, world: int, target: Target) -> Cost:
    work, traffic = [0] * world, [0] * world
    for node in calls(graph):
        alike = all(layout_of(n).uniform for n in (node, *node.all_input_nodes))
        each = [(node_flops(node, rank), node_bytes(node, rank)) for rank in range(1 if alike else world)]
        for rank in range(world):
            added, written = each[0 if alike else rank]
            work[rank] += added
            traffic[rank] += written
    compute = max(w / target.flops + 2 * t / target.memory for w, t in zip(work, traffic, strict=True))
    return Cost(compute, exchange_seconds(graph, world, target), tuple(work))
