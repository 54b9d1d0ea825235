"""cuts: choose which values are split, along which dim and where, by the cost of the partitioned graph.

    1. one input and dim (the image's rows, the tokens), with cuts on multiples of 1, 2, 4 … rows
    2. further inputs (the text stream; several of one shape at once), while they make the slowest rank faster
    3. a value inside (the tokens after patch embedding), where rows cannot be divided evenly

Each candidate is partitioned, trimmed and judged: first by imbalance of the work, in steps of a quarter,
then by its time under the cost model. (By time alone a tiny model would never be split; the user asked for it.)
Candidates whose rows are less balanced than the best candidate's work are skipped.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import floor, log
from typing import Any

from torch import fx

from ..ir.exchange import Role
from ..ir.layout import Layout, Rows, even, shared
from ..ir.program import Program, calls, exchanges_of, layout_of, reached, shape_of
from ..ir.progress import say
from .cost import Cost, cost, flops, node_flops, totals
from .limits import WorldSizeError, refusal
from .partition import Rule, partition
from .sizes import Sizes, sizes_of
from .targets import Target
from .trim import trim

Cuts = dict[str, Layout]  #: by name of input or value
OVERHEAD: tuple[Role, ...] = ("realign", "rebalance", "small", "fallback")  #: roles of exchanges that the cuts ask for
USERS = operator.attrgetter("users")
GRAINS = (1, 2, 4, 8, 16, 32)
WORTHWHILE = 1.2  #: smallest speed-up that is a split; less is replication
GOOD = 0.97  #: share of the ideal speed-up at which the search stops
INNER = 4  #: largest number of values inside the model that are tried, of each kind
ALIKE = 0.05  #: dims whose largest shares of rows differ by less count as equally even
HOPEFUL = 3  #: imbalance, in steps of a quarter, above which coarser grains are skipped


@dataclass(frozen=True)
class Candidate:
    """One set of cuts, the graphs that result, and their cost."""

    cuts: Cuts
    partitioned: fx.Graph
    trimmed: fx.Graph
    cost: Cost
    imbalance: int  #: in steps of a quarter; see the function `_imbalance`

    @property
    def rank(self) -> tuple[int, float]:
        """Smaller is better."""
        return self.imbalance, self.cost.seconds


@dataclass(frozen=True)
class Tried:
    """What the search found out about one set of cuts, without its graphs."""

    cuts: tuple[tuple[str, Layout], ...]  #: by name of input or value
    evenness: float  #: the speed-up that the division of work allows, as a share of the ideal
    received: int  #: bytes in an exact step, by the rank that receives most
    compute: float  #: seconds on the slowest rank, by the cost model
    exchange: float  #: seconds of all exchanges in sequence


@dataclass(frozen=True)
class Found:
    """The result of the search."""

    cuts: Cuts
    tried: tuple[Tried, ...] = ()  #: the candidates that were partitioned and judged, in order
    best: Candidate | None = None  #: the winner; None if nothing had to be searched


@dataclass
class Search:
    """The candidates tried so far and the best of them."""

    graph: fx.Graph
    world: int
    target: Target
    rules: Mapping[Any, Rule]
    inputs: tuple[str, ...]
    shares: tuple[float, ...] = ()  #: of the work that each rank is to do, 1 on average; (): all the same
    total: int = 0
    best: Candidate | None = None
    tried: dict[tuple[tuple[str, Layout], ...], Tried] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.total = flops(self.graph)

    def attempt(self, cuts: Cuts) -> bool:
        """Partition by one set of cuts and judge the result; whether a coarser grain might save exchanges."""
        key = tuple(sorted(cuts.items(), key=lambda item: item[0]))
        if key in self.tried:
            return False
        say(f"cuts: candidate {len(self.tried) + 1}")
        partitioned = partition(self.graph, self.world, cuts, self.rules)
        trimmed = trim(partitioned, self.graph, self.world, self.rules)
        judged = cost(trimmed, self.world, self.target, self.shares)
        share = self.world * self._slowest(judged) / self.total if self.total else 1.0
        imbalance = _imbalance(share)
        self.tried[key] = Tried(tuple(cuts.items()), 1 / share, judged.received, judged.compute, judged.exchange)
        candidate = Candidate(cuts, partitioned, trimmed, judged, imbalance)
        if self.best is None or candidate.rank < self.best.rank:
            self.best = candidate
        return imbalance <= HOPEFUL and _moves_cuts(trimmed)

    def run(self) -> bool:
        """Search; whether the best candidate makes the slowest rank faster by `WORTHWHILE`."""
        candidates = list(_candidates(self))
        for node, dim in candidates:
            if self.best is not None and not self.best.imbalance and node.name not in self.cuts:
                break  # one input balances the work: others may join it
            for rows in _grains(self, shape_of(node)[dim]):
                if self.best is not None and _imbalance(self.share(shape_of(node)[dim])) > self.best.imbalance:
                    break
                if not self.attempt({node.name: Layout(dim, rows)}):
                    break
            if self.best is not None and self.reached >= GOOD and not _moves_cuts(self.best.trimmed):
                break
        for node, dim in candidates:
            if self.reached >= GOOD:
                break
            if self.best is not None and node.name not in self.cuts:
                layout = Layout(dim, self.rows(shape_of(node)[dim]))
                alike = [n for n, d in candidates if (shape_of(n), d) == (shape_of(node), dim)]
                self.attempt({n.name: layout for n in alike} | self.cuts)  # one of many may not be worth its exchanges
                self.attempt({node.name: layout} | self.cuts)
        for values in _inner(self, self.best) if self.best is not None and self.reached < GOOD else ():
            failures = 0
            for name, layout in values:
                before = self.reached
                if before < GOOD and failures < 2:
                    self.attempt({**self.cuts, name: layout})
                    failures = 0 if self.reached > before else failures + 1
        return self.best is not None and (not self.total or self.bound >= WORTHWHILE)

    @property
    def cuts(self) -> Cuts:
        return self.best.cuts if self.best else {}

    @property
    def bound(self) -> float:
        """Unsplit work over the slowest rank's, as if all were as fast as they are on average."""
        return self.total / self._slowest(self.best.cost) if self.best and self.total else 0.0

    @property
    def reached(self) -> float:
        """The bound as a share of the ideal."""
        return self.bound / self.world

    def _slowest(self, judged: Cost) -> float:
        """The work of the rank that takes longest, as if all were as fast as they are on average."""
        if not self.shares:
            return max(judged.flops_per_rank)
        return max(work / share for work, share in zip(judged.flops_per_rank, self.shares, strict=True))

    def rows(self, size: int, grain: int = 1) -> tuple[Rows, ...]:
        """The rows of each rank, as near to its share as cuts at multiples of `grain` allow."""
        return shared(size, self.shares, grain) if self.shares else even(size, self.world, grain)

    def share(self, size: int) -> float:
        """The largest number of rows on a rank, relative to its share."""
        return self.world * self.most(self.rows(size)) / size

    def most(self, rows: Sequence[Rows]) -> float:
        """The largest number of rows on a rank, each relative to its share."""
        shares = self.shares or (1.0,) * self.world
        return max(len(each) / share for each, share in zip(rows, shares, strict=True))


def choose_cuts(
    program: Program, world: int, target: Target, rules: Mapping[Any, Rule], shares: tuple[float, ...] = ()
) -> Found:
    """The best cuts found, and how many candidates were tried.

    Args:
        shares: of the work that each rank is to do, 1 on average; (): all the same.

    Raises `WorldSizeError` if no cut makes the model faster on `world` ranks; the message says what limits it.
    """
    graph, inputs = program.graph, program.inputs
    if world == 1 or not any(0 not in node.meta.get("shape", ()) for node in calls(graph)):
        return Found({})  # one rank, or nothing to compute: an empty batch
    search = Search(graph, world, target, rules, inputs, shares)
    if search.run():
        return Found(search.cuts, tuple(search.tried.values()), search.best)
    if shares and Search(graph, world, target, rules, inputs).run():
        most = max(shares) / min(shares)
        raise WorldSizeError(
            f"this model can be shared among {world} ranks, but not in proportion to these speeds: no cut leaves as "
            f"little work to the slowest rank as its share, 1/{most:.3g} of the fastest one's; give speeds nearer to "
            "each other, or leave the slowest process out"
        )
    two = search if world == 2 else Search(graph, 2, target, rules, inputs)
    shared = two is not search and two.run()
    sizes = _sizes(two)
    lengths = [shape_of(node)[dim] for node, dim in _candidates(two)]
    most = _most(search, sizes) if shared else None
    rows = {each: each.smallest(world, WORTHWHILE, GRAINS) for each in sizes}
    larger = {each: needed for each, needed in rows.items() if needed is not None and needed > each.size}
    best = search.best
    raise WorldSizeError(
        refusal(program, world, lengths, most, larger, best.trimmed if best else None, search.cuts, search.bound)
    )


def _sizes(search: Search) -> list[Sizes]:
    """How the work would be shared if the input that is cut were larger along one of its dims."""
    candidates = list(_candidates(search))
    main = next((node for node, _ in candidates if node.name in search.cuts), None)
    if main is None or search.best is None:
        return []
    dims = sorted(dim for node, dim in candidates if node is main)
    found: list[Sizes] = []
    for dim in dims:
        others = max((shape_of(main)[each] for each in dims if each != dim), default=0)
        if search.cuts[main.name].dim == dim:
            split = search.best.trimmed
        else:
            cut = {main.name: Layout(dim, even(shape_of(main)[dim], search.world))}
            split = partition(search.graph, search.world, cut, search.rules)
            if search.total < WORTHWHILE * max(totals(split, search.world, node_flops)[0]):
                continue  # channels, say
        found.append(sizes_of(search.graph, split, main.name, dim, others))
    return found


def _most(search: Search, sizes: Collection[Sizes]) -> int:
    """The largest number of ranks, below that of a search that failed, that can share the model; two can."""

    def can(world: int) -> bool:
        return Search(search.graph, world, search.target, search.rules, search.inputs).run()

    def likely(world: int) -> bool:
        return any(each.bound(each.size, world, GRAINS) >= WORTHWHILE for each in sizes)

    fewest, too_many = 2, search.world
    guess = next((n for n in range(too_many - 1, 2, -1) if likely(n)), 2)
    while too_many - fewest > 1:
        n = guess if fewest < guess < too_many else fewest + 1 if fewest == guess else (fewest + too_many) // 2
        fewest, too_many = (n, too_many) if can(n) else (fewest, n)
    return fewest


def _imbalance(share: float) -> int:
    """Imbalance in steps: 0 if the slowest rank has at most 1.25 times its share of the work, 1 up to 1.25², …"""
    return max(0, floor(log(share) / log(1.25)))


def _candidates(search: Search) -> Iterator[tuple[fx.Node, int]]:
    """(input, dim) pairs that may be cut: first inputs that most work depends on, then the largest; even dims first.

    Dim 0 is the batch, and never cut.
    """
    weight = downstream(search.graph)
    nodes = inputs_with_rows(search.graph, search.inputs)
    largest = max((weight[n] for n in nodes), default=0)
    nodes = [n for n in nodes if weight[n] > largest // 2 or not largest]
    size = {n: n.meta["val"].numel() for n in nodes}
    for node in sorted(nodes, key=lambda n: (-size[n] * (weight[n] > 0.9 * largest), search.inputs.index(n.name))):
        shape = shape_of(node)
        dims = [dim for dim in range(1, len(shape)) if shape[dim] >= search.world]
        for dim in sorted(dims, key=lambda d: floor((search.share(shape[d]) - 1) / ALIKE)):
            yield node, dim


def inputs_with_rows(graph: fx.Graph, inputs: tuple[str, ...]) -> list[fx.Node]:
    """The inputs that may be cut: of floating-point numbers those with three dims or more, or else [batch, samples].

    If there are none of these, grids of whole numbers, such as [batch, rows, columns] of a codebook's entries.
    """
    nodes = [n for n in graph.nodes if n.op == "placeholder" and n.name in inputs and "shape" in n.meta]
    real = [n for n in nodes if n.meta["dtype"].is_floating_point]
    for chosen, least in ((real, 3), (real, 2), (nodes, 3)):
        if found := [n for n in chosen if len(shape_of(n)) >= least]:
            return found
    return []


def downstream(graph: fx.Graph) -> dict[fx.Node, int]:
    """For each input, the FLOPs of all operators that depend on it."""
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    reach: dict[fx.Node, int] = {n: 1 << i for i, n in enumerate(inputs)}
    totals = dict.fromkeys(inputs, 0)
    for node in calls(graph):
        mask = 0
        for operand in node.all_input_nodes:
            mask |= reach[operand]
        reach[node] = mask
        work = node_flops(node)
        if work:
            for i, n in enumerate(inputs):
                if mask >> i & 1:
                    totals[n] += work
    return totals


def _moves_cuts(graph: fx.Graph) -> bool:
    """Whether values are cut again inside the model, which a coarser grain or another dim might avoid."""
    return any(each.role in OVERHEAD for _, declared in exchanges_of(graph) for each in declared)


def _grains(search: Search, size: int) -> list[tuple[Rows, ...]]:
    """Cuts on multiples of 1, 2, 4, … rows, while every rank gets a row."""
    found: list[tuple[Rows, ...]] = []
    for grain in GRAINS:
        rows = search.rows(size, grain)
        if all(r.runs for r in rows) and rows not in found:
            found.append(rows)
    return found


def _inner(search: Search, best: Candidate) -> tuple[list[tuple[str, Layout]], list[tuple[str, Layout]]]:
    """Values that most of the work depends on and that could be divided more evenly than the best candidate does.

    Two lists: values where streams begin that depend on no cut value, so that each rank takes its rows without an
    exchange; and values that are cut already, and would be cut again.
    """
    seen: set[tuple[int, ...]] = set()
    free: list[tuple[str, Layout]] = []
    again: list[tuple[str, Layout]] = []
    layouts = {n.meta.get("origin"): layout_of(n) for n in best.trimmed.nodes if n.target is not operator.getitem}
    after = reached([n for n in search.graph.nodes if n.name in best.cuts], USERS)
    streams: set[fx.Node] = set()
    for node in calls(search.graph):
        shape = node.meta.get("shape")
        if node.name not in layouts or shape is None or len(shape) < 3 or shape in seen:
            continue
        if node in streams and node not in after:
            continue
        layout = layouts[node.name]
        dim = layout.dim if layout.dim is not None else max(range(1, len(shape) - 1), key=shape.__getitem__)
        if shape[dim] < 4 * search.world:
            continue
        rows = search.rows(shape[dim])
        if layout.dim is not None and search.most(layout.rows) <= 1.02 * search.most(rows):
            continue
        seen.add(shape)
        found = again if node in after else free
        if len(found) == INNER:
            continue
        following = reached([node], USERS)
        own = node in after or any(map(node_flops, following - after))
        if own and sum(map(node_flops, following)) > search.total // 2:
            found.append((node.name, Layout(dim, rows)))
            streams |= set() if node in after else following
    return free, again
