"""The specification of each stage of the compiler, checked after every pass.

A specification is a list of (sentence, check). A check yields the nodes for which the sentence is not true.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Literal

from torch import fx
from torch._ops import OpOverload

from . import ops
from .exchange import DISPLACED, Exchange
from .fetch import Fetch
from .layout import Layout, PerRank, Rows, owned
from .merge import Moments
from .operators import spec_of
from .program import calls, exchanges_of, fetched, layout_of, shape_of
from .transfer import Transfer

Stage = Literal["captured", "normal", "partitioned", "displaced", "scheduled"]
Check = Callable[[fx.Graph, int], Iterator[fx.Node]]


class VerificationError(AssertionError):
    """A pass broke the specification of its stage; the message has the stage, the sentence and the first nodes."""


def _operators(graph: fx.Graph, world: int) -> Iterator[fx.Node]:
    for node in graph.nodes:
        known = node.target is operator.getitem or isinstance(node.target, OpOverload)
        if node.op not in ("placeholder", "output") and not (node.op == "call_function" and known):
            yield node


def _functional(graph: fx.Graph, world: int) -> Iterator[fx.Node]:
    for node in calls(graph):
        if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:  # pyright: ignore[reportPrivateUsage]
            yield node


def _shaped(graph: fx.Graph, world: int) -> Iterator[fx.Node]:
    for node in graph.nodes:
        described = ("shape" in node.meta) == ("dtype" in node.meta)
        if not described or not all(isinstance(n, int) for n in node.meta.get("shape", ())):
            yield node


def _normal(graph: fx.Graph, world: int) -> Iterator[fx.Node]:
    """Operators that have a form and no rule are other names for those that normal form uses."""
    for node in calls(graph):
        spec = spec_of(node.target)
        if spec.form is not None and spec.rule is None:
            yield node


def _local(graph: fx.Graph, world: int) -> Iterator[fx.Node]:
    known = (OpOverload,)
    for node in calls(graph):
        if not (isinstance(node.target, known) or node.target is operator.getitem or node.target in ops.LOCAL):
            yield node


def _per_rank_values(graph: fx.Graph, world: int) -> Iterator[fx.Node]:
    """A `PerRank` argument has one value per rank, or per place on its axis."""
    for node in graph.nodes:
        if any(len(e.values) != (e.axis.size if e.axis else world) for e in _per_rank((node.args, node.kwargs))):
            yield node


def _per_rank(tree: Any) -> Iterator[PerRank]:
    if isinstance(tree, PerRank):
        yield tree
    elif isinstance(tree, slice):
        yield from _per_rank((tree.start, tree.stop, tree.step))
    elif isinstance(tree, (tuple, list, dict)):
        for each in tree.values() if isinstance(tree, dict) else tree:
            yield from _per_rank(each)


def _covered(graph: fx.Graph, world: int) -> Iterator[fx.Node]:
    """A split layout has one set of rows per rank. The sets cover the dim, but in values with `holes`."""
    for node in graph.nodes:
        layout = layout_of(node)
        if not layout.split:
            continue
        if not _lawful(layout, shape_of(node)[layout.axis], world, "holes" in node.meta):
            yield node


@lru_cache(maxsize=4096)
def _lawful(layout: Layout, size: int, world: int, holes: bool) -> bool:
    """Whether a split layout has a set of rows per rank, inside a dim of `size`, which they cover."""
    inside = all(rows <= Rows.interval(0, size) for rows in layout.rows)
    return len(layout.rows) == world and inside and (holes or layout.covers(size))


def _complete(graph: fx.Graph, world: int) -> Iterator[fx.Node]:
    """A value with holes is neither exchanged nor an output, but may go to the same patch of other stages."""
    for node in graph.nodes:
        leaves = node.op == "output" or (node.target is ops.exchange and not _transfers(node))
        if leaves and any("holes" in value.meta for value in node.all_input_nodes):
            yield node


def _declared(graph: fx.Graph, world: int) -> Iterator[fx.Node]:
    """An exchange is declared for the layout that its operand has."""
    for node, declared in exchanges_of(graph):
        for value, exchange in zip(node.args[0], declared, strict=True):  # type: ignore[arg-type]
            layout, shape = layout_of(value), value.meta["shape"]
            ranks = exchange.axis.size if exchange.axis else world
            right = exchange.world == ranks and exchange.dtype == value.meta["dtype"]
            if _along_samples(exchange):
                right &= not layout.split and isinstance(exchange, Fetch) and _parts(exchange) == {shape}
            elif exchange.shape != shape:
                right = False
            elif isinstance(exchange, Transfer):
                right &= exchange.layout == layout
            elif isinstance(exchange, Fetch):
                everything = (Rows.interval(0, shape[exchange.dim]),) * world
                right &= exchange.have == (layout.rows if layout.split else everything)
                right &= layout.dim in (None, exchange.dim)
            else:
                right &= not layout.split
            if not right:
                yield node
                break


def _transfers(node: fx.Node) -> bool:
    """Whether an exchange gives values to other stages."""
    return any(isinstance(each, Transfer) for each in node.args[1])  # type: ignore[union-attr]


def _along_samples(exchange: Exchange) -> bool:
    """Whether the exchange is among groups of ranks: its operands, each whole in its group, are parts of one value."""
    return exchange.axis is not None and exchange.axis.name == "samples"


def _parts(fetch: Fetch) -> set[tuple[int, ...]]:
    """The shapes of the ranks' parts."""
    return {(*fetch.shape[: fetch.dim], len(rows), *fetch.shape[fetch.dim + 1 :]) for rows in fetch.have}


def _resulting(graph: fx.Graph, world: int) -> Iterator[fx.Node]:
    """The result of an exchange has the declared dtype and, on each rank, the declared shape."""
    for node in graph.nodes:
        if (found := fetched(node)) is None:
            continue
        value, exchange = found
        shape, layout = shape_of(value), layout_of(value)
        if node.meta["dtype"] != exchange.dtype or any(
            exchange.result_shape(rank, layout.local_shape(shape, rank))
            != layout_of(node).local_shape(shape_of(node), rank)
            for rank in range(exchange.world)
        ):
            yield node


def _owned(graph: fx.Graph, world: int) -> Iterator[fx.Node]:
    """Named owners hold their rows, and each row has one. A sync fetch of the same rows on all ranks has them."""
    for node, declared in exchanges_of(graph):
        for each in declared:
            if not isinstance(each, Fetch):
                continue
            owners = each.owners or each.have
            held = all(mine <= have for mine, have in zip(owners, each.have, strict=True))
            if not held or (each.owners and owned(owners) != owners) or (each.fresh == "sync" and not _agreed(each)):
                yield node
                break


def _agreed(fetch: Fetch) -> bool:
    return fetch.agrees or len(set(fetch.want)) > 1


def _allowed(graph: fx.Graph, world: int) -> Iterator[fx.Node]:
    """Only halos, keys and values, moments and sums of real numbers may be stale, and what goes to other stages."""
    for node, declared in exchanges_of(graph):
        allowed = [each for each in declared if each.may_be_stale]
        if not all(
            each.role in DISPLACED and (each.dtype.is_floating_point or isinstance(each, Transfer)) for each in allowed
        ):
            yield node


def _displaced(graph: fx.Graph, world: int) -> Iterator[fx.Node]:
    """Only what its rule allows is stale, and the exchanges of one node are equally fresh.

    A window contains the rank's own rows. Only stale values are coded.
    """
    for node, declared in exchanges_of(graph):
        kinds = {each.fresh for each in declared}
        stale = kinds != {"sync"}
        if len(kinds) > 1 or any(
            (stale and not each.may_be_stale)
            or (each.fresh in ("predicted", "corrected") and not isinstance(each, Moments))
            or (isinstance(each, Fetch) and each.bits and each.fresh != "stale")
            or (isinstance(each, Fetch) and not all(h <= w for h, w in zip(each.have, each.window, strict=False)))
            for each in declared
        ):
            yield node


def _placed(graph: fx.Graph, world: int) -> Iterator[fx.Node]:
    """Every rank that computes an operator has its operands. The ranks of an exchange are those of its axis.

    Of what a transfer gives others, the ranks that send have the operands.
    """
    for node in graph.nodes:
        ranks: tuple[int, ...] | None = node.meta.get("placed")
        launch = node.args[0] if node.target is ops.wait else node
        if launch.target is ops.exchange:
            lines = [each.axis.lines if each.axis else () for each in launch.args[1]]
            if ranks is not None and any({*ranks} != {rank for line in each for rank in line} for each in lines):
                yield node
                continue
            if _transfers(launch):
                ranks = tuple(rank for line in lines[0] for rank in line[: launch.args[1][0].patches])
        held = [
            value.meta["placed"] for value in node.all_input_nodes if "placed" in value.meta and value is not launch
        ]
        if any(ranks is None or not {*ranks} <= {*each} for each in held):
            yield node


def _awaited(graph: fx.Graph, world: int) -> Iterator[fx.Node]:
    """A launch is awaited once, and nothing else uses it."""
    return (node for node, _ in exchanges_of(graph) if [user.target for user in node.users] != [ops.wait])


_BASE: list[tuple[str, Check]] = [
    ("every shape is static and comes with a dtype", _shaped),
    ("operators are functional", _functional),
]
SPECS: dict[Stage, list[tuple[str, Check]]] = {
    "captured": [*_BASE, ("only ATen operators are called", _operators)],
    "normal": [*_BASE, ("only ATen operators are called", _operators), ("operators are in normal form", _normal)],
    "partitioned": [
        *_BASE,
        ("only ATen's and the local operators are called", _local),
        ("arguments that differ from rank to rank have a value for each", _per_rank_values),
        ("layouts cover their dim", _covered),
        ("values with holes stay on their rank", _complete),
        ("exchanges are declared for the layout of their operands", _declared),
        ("results of exchanges have the declared shape", _resulting),
        ("what every rank gets comes from one owner per row", _owned),
        ("rules allow only real halos, keys and values, moments and sums, and transfers, to be stale", _allowed),
    ],
}
SPECS["displaced"] = [
    *SPECS["partitioned"],
    ("only what its rule allows is stale", _displaced),
    ("values are where operators read them", _placed),
]
SPECS["scheduled"] = [*SPECS["displaced"], ("each launch is awaited once", _awaited)]


def verify(graph: fx.Graph, stage: Stage, world: int = 1) -> None:
    """Raises `VerificationError` if `graph` does not meet the specification of `stage`."""
    graph.lint()
    for rule, check in SPECS[stage]:
        broken: list[Any] = [node.format_node() for node, _ in zip(check(graph, world), range(3), strict=False)]
        if broken:
            raise VerificationError(f"{stage}: not true that {rule}:\n  " + "\n  ".join(map(str, broken)))
