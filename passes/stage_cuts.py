"""Where to cut the depth of a model: the stage of each operator, by work, weights and what lives across a cut.

Operators that depend on an input with rows are the *trunk*. In their order, a cut is a position, and all values that
live across it must be sent. Positions where few bytes live are candidates; among them the cuts are searched that leave
each stage the least share of the work and of the weights. Everything else is *free* to run on any stage: embeddings of
the timestep, modulation, what becomes of weights alone. It goes to the stages that read it. Free operators with many
weights run on one stage only, and move to stages with fewer weights where theirs has too many.
"""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf, prod

import numpy as np
from torch import fx

from ..ir.operators import spec_of
from ..ir.program import Program, calls, layout_of, reached, shape_of
from .cost import node_bytes, node_flops
from .cuts import USERS, inputs_with_rows
from .limits import WorldSizeError
from .targets import Target

LIGHT = 1e-3  #: of all weights: free operators with fewer run on every stage that reads them
FULL = 1.02  #: times an even share of the weights: above that, free operators move to other stages
NEAR = 32  #: a candidate has the fewest bytes among so many parts of each stage
ROOM = 1.02  #: times the least possible share of the fullest stage: so full it may be of weights
SLACK = 1.01  #: times the least possible work of the slowest stage: within that, the cuts with the fewest bytes win
OPERANDS = operator.attrgetter("all_input_nodes")


@dataclass(frozen=True)
class Depth:
    """The operators of a partitioned graph in order, with what each costs.

    Attributes:
        weights: names of the placeholders of weights.
        rows: the inputs with rows.
        patches: ranks of each stage.
    """

    graph: fx.Graph
    weights: frozenset[str]
    rows: tuple[fx.Node, ...]
    patches: int
    target: Target

    @staticmethod
    def of(graph: fx.Graph, program: Program, patches: int, target: Target) -> Depth:
        names = {node.name for node in inputs_with_rows(program.graph, program.inputs)}
        given = [node for node in graph.nodes if node.op == "placeholder"]
        rows = [node for node in given if node.name in names] or [node for node in given if node.name in program.inputs]
        return Depth(graph, frozenset(program.weights), tuple(rows), patches, target)

    @cached_property
    def trunk(self) -> set[fx.Node]:
        """The operators that depend on an input with rows."""
        return reached(self.rows, USERS).difference(self.rows)

    @cached_property
    def of_weights(self) -> set[fx.Node]:
        """Weights, and operators that depend on nothing else."""
        found = {node for node in self.graph.nodes if node.op == "placeholder" and node.name in self.weights}
        for node in calls(self.graph):
            if node.all_input_nodes and all(each in found for each in node.all_input_nodes):
                found.add(node)
        return found

    @cached_property
    def position(self) -> dict[fx.Node, int]:
        """The place of each operator of the trunk; of anything else, the first place at which it is read."""
        found: dict[fx.Node, int] = {}
        count = 0
        for node in calls(self.graph):
            if node in self.trunk:
                part = node.target is operator.getitem
                found[node] = found[node.args[0]] if part else count  # type: ignore[index]
                count += not part
        for node in reversed(self.graph.nodes):
            if node.op != "output" and node not in found:
                found[node] = min((found.get(user, count - 1) for user in node.users), default=count - 1)
        return found

    @cached_property
    def length(self) -> int:
        """The number of places."""
        return 1 + max((self.position[node] for node in self.trunk if node.op == "call_function"), default=-1)

    def own_weights(self, node: fx.Node) -> int:
        """Bytes of the weights that an operator reads, itself or through operators on weights alone."""
        found = reached([each for each in node.all_input_nodes if each in self.of_weights], OPERANDS)
        return sum(size_of(each) for each in found if each.op == "placeholder")

    @cached_property
    def heavy(self) -> dict[fx.Node, int]:
        """Free operators with so many bytes of weights that they run on one stage only."""
        free = [node for node in calls(self.graph) if node not in self.trunk and node not in self.of_weights]
        sizes = {node: self.own_weights(node) for node in free}
        return {node: size for node, size in sizes.items() if size > LIGHT * self.total}

    @cached_property
    def total(self) -> int:
        """Bytes of all weights."""
        return sum(size_of(node) for node in self.of_weights if node.op == "placeholder")

    @cached_property
    def fixed(self) -> list[int]:
        """Bytes of the weights that each place needs: those that the trunk reads first there."""
        movable = set(self.heavy)
        found = [0] * self.length
        for node in self.of_weights:
            if node.op == "placeholder" and node.users and not reached([node], self._readers) & movable:
                found[self.position[node]] += size_of(node)
        return found

    def _readers(self, node: fx.Node) -> Iterable[fx.Node]:
        return node.users if node in self.of_weights else ()

    @cached_property
    def seconds(self) -> list[float]:
        """Of the work of each place, on the slowest rank of a stage."""
        found = [0.0] * self.length
        for node in calls(self.graph):
            if node not in self.of_weights:
                work = (self.target.compute(node_flops(node, r), node_bytes(node, r)) for r in range(self.patches))
                found[self.position[node]] += max(work)
        return found

    @cached_property
    def crossing(self) -> list[int]:
        """Bytes that live across a cut behind each place, of all patches together."""
        change = [0] * (self.length + 1)
        last: dict[fx.Node, int] = {}
        for node in calls(self.graph):
            if node in self.trunk:
                for each in node.all_input_nodes:
                    base = self.base(each)
                    last[base] = max(last.get(base, 0), self.position[node])
        for node, end in last.items():
            if node in self.trunk and node.op == "call_function" and "shape" in node.meta:
                size = sum(size_of(node, rank) for rank in range(self.patches))
                change[self.position[node]] += size
                change[end] -= size
        found, alive = [], 0
        for each in change[: self.length]:
            alive += each
            found.append(alive)
        return found

    def base(self, node: fx.Node) -> fx.Node:
        """The value that a node is a view of, if that has as many elements; else the node."""
        while self.is_view(node):
            node = node.all_input_nodes[0]
        return node

    def is_view(self, node: fx.Node) -> bool:
        """Whether a node of the trunk is another shape of one value: where that is read, it costs nothing."""
        if node not in self.trunk or not spec_of(node.target).free or len(node.all_input_nodes) != 1:
            return False
        source = node.all_input_nodes[0]
        known = source in self.trunk and all("shape" in each.meta for each in (source, node))
        return known and prod(shape_of(source)) == prod(shape_of(node))


def size_of(node: fx.Node, rank: int = 0) -> int:
    """Bytes of a value on a rank; 0 if it is no tensor."""
    if "dtype" not in node.meta:
        return 0
    return prod(layout_of(node).local_shape(shape_of(node), rank)) * node.meta["dtype"].itemsize


@dataclass(frozen=True)
class Assigned:
    """Where the depth is cut, and which stages compute each operator and hold each weight."""

    cuts: tuple[int, ...]  #: the last place of each stage but the last
    of: dict[fx.Node, tuple[int, ...]]  #: inputs and constants are not in it: every stage has them


def assign(depth: Depth, stages: int) -> Assigned:
    """Cut the depth into so many stages. Raises `WorldSizeError` if it has too few places."""
    cuts = _choose(depth, stages)
    own = {node: bisect_left(cuts, place) for node, place in depth.position.items()}
    moved = _balanced(depth, cuts, own)
    found: dict[fx.Node, tuple[int, ...]] = {}
    parts: dict[fx.Node, set[int]] = {}  #: of operators with several results: the stages that read one
    for node in reversed(depth.graph.nodes):
        if node.op == "output" or (node.op == "placeholder" and node not in depth.of_weights):
            continue
        readers = parts.pop(node, set())
        for user in node.users:
            if user.op != "output":
                readers.update(found.get(user, ()))
            elif node in depth.trunk:  # sent from where it is made
                readers.add(own[depth.base(node)])
            else:
                readers.update(range(stages))
        if node.target is operator.getitem:
            parts.setdefault(node.args[0], set()).update(readers)
        elif node in moved:
            readers = {moved[node]}
        elif node in depth.trunk and not depth.is_view(node):
            readers = {own[node]}
        found[node] = tuple(sorted(readers))
    for node in calls(depth.graph):
        if node.target is operator.getitem:
            found[node] = found[node.args[0]]  # type: ignore[index]
    return Assigned(cuts, found)


def _choose(depth: Depth, stages: int) -> tuple[int, ...]:
    """The last place of each stage but the last.

    The fullest stage has nearly the least share possible of work or weights; then the slowest one nearly the least
    work possible; then the fewest bytes travel.
    """
    places = _candidates(depth, stages)
    if len(places) < stages - 1:
        most = len(places) + 1
        raise WorldSizeError(
            f"this model cannot be cut into {stages} stages: only {most} of its operators depend on each other and on "
            f"an input with rows; stages={most} would do"
        )
    begins, ends = np.array([-1, *places]), np.array([*places, depth.length - 1])
    later = ends[None, :] > begins[:, None]

    def shares(figures: Sequence[float], total: float) -> np.ndarray:
        """Of the stages that begin behind one place and end with another, in units of an even share."""
        sums = np.concatenate([[0.0], np.cumsum(figures)])
        parts = (sums[ends + 1][None, :] - sums[begins + 1][:, None]) * stages / (total or 1.0)
        return np.where(later, parts, inf)

    work, weights = shares(depth.seconds, sum(depth.seconds)), shares(depth.fixed, depth.total)
    fits = weights <= ROOM * _least(np.maximum(work, weights), stages)
    even = np.where(fits, work, inf)
    allowed = even <= SLACK * _least(even, stages)
    return _fewest_bytes(allowed, np.array([depth.crossing[place] for place in places]), places, stages)


def _least(share: np.ndarray, stages: int) -> float:
    """The least possible share of the stage that has most.

    Args:
        share: of a stage that begins behind one place and ends with another.
    """
    found = np.full(len(share) + 1, inf)  #: of the stages so far that end before each place
    found[0] = 0.0
    for _ in range(stages):
        found = np.concatenate([[inf], np.maximum(found[:-1, None], share).min(0)])
    return float(found[-1])


def _fewest_bytes(allowed: np.ndarray, crossing: np.ndarray, places: Sequence[int], stages: int) -> tuple[int, ...]:
    """The cuts over which fewest bytes travel.

    Args:
        allowed: whether a stage may begin behind one place and end with another.
        crossing: bytes that live across each.
    """
    cost = np.where(allowed, np.append(crossing.astype(float), 0.0)[None, :], inf)
    total = np.full(len(allowed), inf)
    total[0] = 0.0
    steps: list[np.ndarray] = []
    for _ in range(stages):
        every = total[:, None] + cost
        steps.append(every.argmin(0))
        last, total = every.min(0), np.append(inf, every.min(0)[:-1])
    assert last[-1] < inf
    found: list[int] = []
    end = len(places)
    for step in reversed(steps):
        begin = int(step[end])
        if begin:
            found.append(places[begin - 1])
        end = begin - 1
    return tuple(reversed(found))


def _candidates(depth: Depth, stages: int) -> list[int]:
    """Places with fewest bytes near them; all where these are too few."""
    crossing, places = depth.crossing, range(depth.length - 1)
    near = max(1, depth.length // (NEAR * stages))
    found: list[int] = []
    for place in places:
        around = crossing[max(0, place - near) : min(place + near + 1, depth.length - 1)]
        goes_on = place > 0 and crossing[place] == crossing[place - 1]
        if not goes_on and crossing[place] == min(around):
            found.append(place)
    return found if len(found) >= stages - 1 else list(places)


def _balanced(depth: Depth, cuts: tuple[int, ...], own: Mapping[fx.Node, int]) -> dict[fx.Node, int]:
    """The stage of each heavy free operator: that which reads it first, or one with fewer weights."""
    stages = len(cuts) + 1
    held = [0.0] * stages
    for place, size in enumerate(depth.fixed):
        held[bisect_left(cuts, place)] += size
    found = {node: own[node] for node in depth.heavy}
    for node, size in depth.heavy.items():
        held[found[node]] += size
    most = FULL * depth.total / stages
    for node, size in reversed(depth.heavy.items()):  # what is read last has most time to come
        here, there = found[node], min(range(stages), key=held.__getitem__)
        if held[here] > most and held[there] + size < held[here]:
            found[node] = there
            held[here] -= size
            held[there] += size
    return found
