"""The spec of each stage, and the verifier that checks it after every pass.

A spec is a list of (what must hold, check); a check yields the nodes for which it does not.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import fx
from torch._ops import OpOverload

from . import ops
from .exchange import DISPLACED
from .fetch import Fetch
from .layout import Rows
from .merge import Moments
from .program import calls, exchanges_of, layout_of

Stage = Literal["captured", "normal", "partitioned", "displaced", "scheduled"]
Check = Callable[[fx.Graph, int], Iterator[fx.Node]]

aten = torch.ops.aten
#: operators that normal form has a simpler word for
ABNORMAL = {
    aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim, aten.transpose.int,
    aten.t.default, aten.select.int, aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default,
    aten.stack.default, aten.alias.default, aten.detach.default, aten.conv1d.default, aten.conv2d.default,
    aten.conv3d.default,
}  # fmt: skip


class VerificationError(AssertionError):
    """A pass broke the spec of its stage; the message names the stage, the rule and the first nodes."""


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
    return (node for node in calls(graph) if node.target in ABNORMAL)


def _local(graph: fx.Graph, world: int) -> Iterator[fx.Node]:
    known = (OpOverload,)
    for node in calls(graph):
        if not (isinstance(node.target, known) or node.target is operator.getitem or node.target in ops.LOCAL):
            yield node


def _covered(graph: fx.Graph, world: int) -> Iterator[fx.Node]:
    """Layouts have a set for each rank, and the sets cover the dim (frames of a halo excepted)."""
    for node in graph.nodes:
        layout = layout_of(node)
        if not layout.split:
            continue
        size = node.meta["shape"][layout.axis]
        if len(layout.rows) != world or any(r.runs and (r.start < 0 or r.stop > size) for r in layout.rows):
            yield node


def _declared(graph: fx.Graph, world: int) -> Iterator[fx.Node]:
    """An exchange is declared for the layout that its operand has."""
    for node, declared in exchanges_of(graph):
        for value, exchange in zip(node.args[0], declared, strict=True):  # type: ignore[arg-type]
            layout, shape = layout_of(value), value.meta["shape"]
            right = exchange.world == world and exchange.shape == shape and exchange.dtype == value.meta["dtype"]
            if isinstance(exchange, Fetch):
                everything = (Rows.interval(0, shape[exchange.dim]),) * world
                right &= exchange.have == (layout.rows if layout.split else everything)
                right &= layout.dim in (None, exchange.dim)
            else:
                right &= not layout.split
            if not right:
                yield node
                break


def _displaced(graph: fx.Graph, world: int) -> Iterator[fx.Node]:
    """Only halos, keys and values, moments and sums of real numbers are stale, all of a node alike.

    Windows hold the own rows. Changes are coded of what is stale.
    """
    for node, declared in exchanges_of(graph):
        kinds = {each.fresh for each in declared}
        stale = kinds != {"sync"}
        if len(kinds) > 1 or any(
            (stale and not (each.role in DISPLACED and each.dtype.is_floating_point))
            or (each.fresh in ("predicted", "corrected", "local") and not isinstance(each, Moments))
            or (isinstance(each, Fetch) and each.bits and each.fresh != "stale")
            or (isinstance(each, Fetch) and not all(h <= w for h, w in zip(each.have, each.window, strict=False)))
            for each in declared
        ):
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
        ("layouts lie within the whole value", _covered),
        ("exchanges are declared for the layout of their operands", _declared),
    ],
}
SPECS["displaced"] = [*SPECS["partitioned"], ("only what law 4 allows is stale", _displaced)]
SPECS["scheduled"] = [*SPECS["displaced"], ("each launch is awaited once", _awaited)]


def verify(graph: fx.Graph, stage: Stage, world: int = 1) -> None:
    """Raises `VerificationError` if `graph` does not meet the spec of `stage`."""
    graph.lint()
    for rule, check in SPECS[stage]:
        broken: list[Any] = [node.format_node() for node, _ in zip(check(graph, world), range(3), strict=False)]
        if broken:
            raise VerificationError(f"{stage}: not true that {rule}:\n  " + "\n  ".join(map(str, broken)))
