"""The memory of a device: weights, what is kept between steps, and the activations that are alive at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
from torch import fx

from ..ir import comm
from ..ir.program import Program, placeholders_on
from ..ir.step import StepProgram
from .price import Figures, Prices


@dataclass(frozen=True)
class Memory:
    """Bytes on the device of one process.

    Attributes:
        weights: parameters, buffers and constants of the model: of the stage that the process runs.
        state: messages that the next step reads, and what forecasts, estimates and codes need of the steps before.
        activations: inputs, results of operators and copies of messages, where most of them are alive at once.
        beside: weights of the other parts of the pipeline, by name.
        decoding: activations of the decode that follows the last step.
    """

    weights: int
    state: int
    activations: int
    beside: Mapping[str, int] = field(default_factory=dict)
    decoding: int = 0

    @property
    def total(self) -> int:
        return self.weights + sum(self.beside.values()) + self.state + max(self.activations, self.decoding)

    def items(self) -> list[tuple[str, int]]:
        """What adds up to the total: (name, bytes)."""
        alive = [("activations", self.activations)]
        if self.decoding > self.activations:
            alive = [("activations of decoding", self.decoding)]
        return [("weights", self.weights), *self.beside.items(), ("state", self.state), *alive]


def weights_of(program: Program, graph: fx.Graph, ranks: Sequence[int]) -> int:
    """Bytes of the weights and constants that some ranks have.

    Args:
        graph: the partitioned graph.
    """
    held = {*placeholders_on(program, graph, ranks), *program.constants}
    return sum(_bytes(node) for node in graph.nodes if node.op == "placeholder" and node.name in held)


def _bytes(node: fx.Node) -> int:
    return prod(node.meta["shape"]) * node.meta["dtype"].itemsize if "shape" in node.meta else 0


def alive(program: StepProgram, inputs: Sequence[str], prices: Prices) -> Figures:
    """Bytes of the values that are alive while each node runs: [node, rank].

    A view keeps alive what it is a view of. A value lives until its last use; outputs and new state until the end.

    Args:
        inputs: names of the placeholders that count as activations.
    """
    nodes = list(program.graph.nodes)
    owner: dict[fx.Node, fx.Node] = {}  #: whose memory a value is in
    size: dict[fx.Node, Figures] = {}
    most: dict[fx.Node, Figures] = {}  #: what a node allocates at once
    last: dict[fx.Node, int] = {}
    for i, node in enumerate(nodes):
        owner[node], size[node], most[node] = _owner(node, owner, prices, program, inputs)
        for used in (node, *node.all_input_nodes):
            last[owner[used]] = i
    held = np.zeros(1)
    found: list[Figures] = []
    last |= {node: len(nodes) for node in nodes if node.op == "placeholder"}  # held by the caller
    ending: dict[int, list[fx.Node]] = {}
    for node, i in last.items():
        ending.setdefault(i, []).append(node)
    for i, node in enumerate(nodes):
        found.append(held + most[node])
        held = held + size[node]
        for each in ending.get(i, ()):
            held = held - size[each]
    return np.stack(np.broadcast_arrays(*found, np.zeros(prices.world))[:-1])


def _owner(
    node: fx.Node, owner: dict[fx.Node, fx.Node], prices: Prices, program: StepProgram, inputs: Sequence[str]
) -> tuple[fx.Node, Figures, Figures]:
    """The value in whose memory a node's value is; the bytes of the value, and those allocated at once to make it."""
    if node.op == "placeholder":
        size = np.array([float(_bytes(node) if node.target in inputs else 0)])
        return node, size, size
    if node.target is comm.get:
        exchanges = program.channels[node.args[0]].exchanges  # type: ignore[index]
        size = sum((prices.communication(comm.assemble, each).allocated for each in exchanges), np.zeros(1))
        return node, size, size
    price = prices.of(node)
    if node.op == "call_function" and not price.allocated.any() and node.all_input_nodes:
        source = node.args[1] if node.target is comm.unpack else node.all_input_nodes[0]
        return owner[source], price.allocated, price.most  # type: ignore[index]
    return node, price.allocated, price.most
