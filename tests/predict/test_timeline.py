"""The predicted timeline in Chrome's trace format."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from fxpass.passes.targets import find
from fxpass.plan import Plan
from fxpass.predict.prediction import Steps
from fxpass.predict.timeline import timeline
from tests.inspect.plans import planned

LINKS = ("gpu", "cpu", "ethernet-100g")


def events(made: Plan, link: str = "gpu") -> list[dict[str, Any]]:
    target = find("gpu", link)
    steps = Steps.of(made.program, made.graph, made.world_size, target)
    return json.loads(timeline(steps, made.placement, target.link))["traceEvents"]


def bars(found: list[dict[str, Any]], category: str) -> list[dict[str, Any]]:
    return [each for each in found if each.get("cat") == category]


@pytest.mark.parametrize("link", LINKS)
def test_every_rank_is_a_process_whose_bars_do_not_overlap(link: str) -> None:
    found = events(planned("displaced", 3), link)
    assert {each["pid"] for each in found} == {0, 1, 2}
    for rank in range(3):
        for thread in range(3):
            own = [
                e for e in found if (e["pid"], e.get("tid")) == (rank, thread) and e.get("cat") not in (None, "step")
            ]
            own.sort(key=lambda each: each["ts"])
            assert own or thread
            assert all(a["ts"] + a["dur"] <= b["ts"] + 2e-3 for a, b in pairwise(own))


def test_steps_last_as_long_as_predicted() -> None:
    made = planned("displaced", 2)
    found = events(made)
    steps = bars(found, "step")
    assert [each["name"] for each in steps if not each["pid"]] == ["exact step", "displaced step", "displaced step"]
    predicted = made.predict(find("gpu")).exact.seconds
    longest = max(each["dur"] for each in steps if each["name"] == "exact step")
    assert longest == pytest.approx(predicted * 1e6, abs=2e-3)
    ends = max(each["ts"] + each["dur"] for each in steps)
    assert all(each["ts"] + each["dur"] <= ends + 2e-3 for each in bars(found, "kernel"))  # rounded


def test_kernels_have_the_names_of_the_plans_nodes() -> None:
    made = planned("displaced", 2)
    names = {node.name for node in made.graph.nodes}
    kernels = Counter(each["name"] for each in bars(events(made), "kernel") if not each["pid"])
    operators = {name for name in kernels if name in names}
    assert {"convolution_default_1", "scaled_dot_product_attention_default"} <= operators
    assert all(kernels[name] == 3 for name in operators)  # once a step


def test_messages_have_the_identifiers_and_bytes_of_the_plan() -> None:
    made = planned("compressed", 3)
    known = {e.id: [(e.received(rank), e.received(rank, exact=False)) for rank in range(3)] for e in made.exchanges}
    seen: set[str] = set()
    for each in bars(events(made), "message"):
        arguments = dict(each["args"])
        arguments.pop("module", None)
        sizes = {name: size for name, size in arguments.items() if name.startswith("x")}
        for name, size in sizes.items():
            assert size in known[name][each["pid"]]
        assert {name.partition(".")[0] for name in sizes} == {each["name"].split()[0]}
        senders = {name: size for name, size in arguments.items() if name not in sizes}
        assert all(name.endswith(f"> {each['pid']}") for name in senders)
        assert sum(senders.values()) == sum(sizes.values())
        seen |= sizes.keys()
    assert seen == known.keys()
