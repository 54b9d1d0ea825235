"""Timelines that processes record."""

from __future__ import annotations

import json

import torch

from fxpass.inspect.exchanges import message_ids
from fxpass.passes.lower_comm import StepPrograms
from fxpass.predict.recorded import Flight, Log, RecordedChannel, Span, complete, timeline
from fxpass.runtime.channels import RankChannel
from tests.inspect.plans import planned


def test_the_senders_of_a_halo_are_the_neighbours_that_are_read() -> None:
    plan = planned(world=3)
    programs = StepPrograms(plan.graph, 0)
    found: dict[str, list[list[list[int]]]] = {}
    for spec, name in zip(programs.channels, message_ids(plan.graph, programs.channels), strict=True):
        ends = RankChannel.of_ranks(spec, range(3), torch.device("cpu"))
        recorded = [RecordedChannel(end, spec, name, rank, Log()) for rank, end in enumerate(ends)]
        found.setdefault(spec.exchanges[0].role, []).append([list(each.senders) for each in recorded])
    assert [[1], [0, 2], [1]] in found["halo"]
    assert [[1], [2], []] in found["halo"]  # of a convolution with a stride
    assert found["output"] == [[[1, 2], [0, 2], [0, 1]]]


def test_a_message_has_arrived_when_its_senders_have_written_it_whatever_others_do() -> None:
    logs = [
        Log([Span("exact step", "step", 0.0, 1.0)], [], [Flight("x0", "halo", {"x0.0": size}, senders, began, ended)])
        for size, senders, began, ended in (
            (8, [1], 0.1, 0.2),
            (16, [0, 2], 0.3, 0.4),
            (8, [1], 0.6, 0.7),
            (0, [], 0.8, 0.9),
        )
    ]
    messages = [each for each in json.loads(timeline(logs))["traceEvents"] if each.get("cat") == "message"]
    assert [(each["pid"], each["ts"], each["dur"]) for each in messages] == [
        (0, 3e5, 1e5),
        (1, 1e5, 6e5),
        (2, 3e5, 1e5),
    ]


def test_messages_of_ranks_that_take_part_in_different_ones_are_recorded() -> None:
    def flight(node: str, senders: list[int], began: float) -> Flight:
        return Flight(node, "transfer", {f"{node}.0": 4}, senders, began, began + 0.5)

    first = Log(flights=[flight("x0", [], 1.0), flight("x0", [], 5.0)])
    other = Log(flights=[flight("x1", [], 2.0)])
    last = Log(flights=[flight("x1", [1], 0.0), flight("x0", [0], 0.0), flight("x0", [0], 4.0)])
    complete([first, other, last])
    assert [each.arrived for each in last.flights] == [2.5, 1.5, 5.5]
