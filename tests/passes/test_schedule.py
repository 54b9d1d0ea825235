"""schedule: the same operators in another order, launches early and waits late."""

from __future__ import annotations

import time
from operator import getitem
from typing import Any

import pytest
import torch
from torch import fx

import fxpass
from fxpass.ir import ops
from fxpass.ir.fetch import Fetch
from fxpass.ir.layout import even, full
from fxpass.ir.program import calls
from fxpass.ir.strategy import Strategy
from fxpass.ir.verify import verify
from fxpass.models.small import case
from fxpass.passes import build
from fxpass.passes.schedule import AHEAD, schedule
from fxpass.passes.targets import find

aten = torch.ops.aten


def operators(graph: fx.Graph) -> list[str]:
    return sorted(str(node.target) for node in calls(graph) if node.target is not ops.wait)


def scheduled(before: fx.Graph) -> fx.Graph:
    """Its schedule, in which `meta["at"]` is where a node stood before; of a wait and its results, where the launch."""
    for i, node in enumerate(before.nodes):
        node.meta["at"] = i
    return schedule(before)


def kept_waiting(after: fx.Graph) -> list[tuple[fx.Node, fx.Node]]:
    """Each wait with each operator after it that had all it needs before, and was not too far ahead to be taken."""
    nodes = list(after.nodes)
    position = {node: i for i, node in enumerate(nodes)}
    awaited = {node.args[0]: i for i, node in enumerate(nodes) if node.target is ops.wait}
    found = []
    for here in awaited.values():
        underway = [other for other, there in awaited.items() if position[other] < here <= there]
        limit = min(other.meta["at"] for other in underway) + AHEAD
        for node in nodes[here + 1 :]:
            ready = all(position[value] < here for value in node.all_input_nodes)
            may_run = node.target is ops.exchange or node.meta["at"] <= limit
            if node.op == "call_function" and node.target is not ops.wait and ready and may_run:
                found.append((nodes[here], node))
    return found


@pytest.mark.parametrize("name", ["unet_sd", "flux"])
def test_the_schedule_keeps_all_operators_and_waits_as_late_as_possible(name: str) -> None:
    chosen = case(name)
    model: Any = chosen.build()
    program = fxpass.capture(model, **chosen.inputs(rows=32, seed=0, module=model))
    before = build(program, 2, find("cpu"), Strategy.of("displaced"), after="bucket").current
    after = scheduled(before)
    verify(after, "scheduled", 2)
    assert operators(after) == operators(before)
    assert [n.format_node() for n in schedule(before).nodes] == [n.format_node() for n in after.nodes]
    position = {node: i for i, node in enumerate(after.nodes)}
    waits = [node for node in after.nodes if node.target is ops.wait]
    assert not kept_waiting(after)
    for launch in (node for node in after.nodes if node.target is ops.exchange):  # the line before makes its operand
        made = max(position[value] for value in launch.all_input_nodes)
        between = list(after.nodes)[made + 1 : position[launch]]
        assert all(n.target in (ops.exchange, ops.wait, getitem) for n in between)
    gaps = [position[wait] - position[wait.args[0]] for wait in waits]
    assert max(gaps) > 3  # K and V are under way while the queries are made


def chain(length: int, every: int) -> fx.Graph:
    """A long model: an exchange after every so many operators, and a side branch that needs none."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta = {"shape": (4, 3), "dtype": torch.float32}
    rows, value, side = even(4, 2), x, x
    for i in range(length):
        if i % every == 0:
            declared = Fetch("realign", (4, 3), torch.float32, 2, dim=0, have=full(4, 2), want=rows)
            args: Any = ((value,), (declared,))
            sent = graph.call_function(ops.exchange, args)
            value = graph.call_function(getitem, (sent, 0))
        elif i % 2:
            side = graph.call_function(aten.neg.default, (side,))
        else:
            value = graph.call_function(aten.relu.default, (value,))
    graph.output((value, side))
    for node in graph.nodes:
        node.meta = dict(x.meta)
    return graph


def test_ten_thousand_operators_take_seconds() -> None:
    graph = chain(10_000, 7)
    began = time.perf_counter()
    after = schedule(graph)
    assert time.perf_counter() - began < 10
    assert operators(after) == operators(graph)


def test_no_operator_runs_far_ahead_of_a_wait() -> None:
    graph = scheduled(chain(1000, 100))
    assert not kept_waiting(graph)
    after = list(graph.nodes)
    side = [i for i, node in enumerate(after) if node.target is aten.neg.default]
    first = next(i for i, node in enumerate(after) if node.target is ops.wait)
    assert 0 < sum(i < first for i in side) <= AHEAD
