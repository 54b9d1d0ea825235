"""Every exchange and fallback has one identifier and the same bytes in all outputs, simulated messages among them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from hypothesis import reject
from hypothesis import strategies as st

from fxpass.inspect.draw import dot
from fxpass.inspect.store import to_json
from fxpass.inspect.text import text
from fxpass.ir.step import Mode
from fxpass.ir.strategy import PRESETS
from fxpass.make_plan import plan
from fxpass.passes.limits import WorldSizeError
from fxpass.passes.targets import find
from fxpass.plan import Plan
from fxpass.predict.prediction import Steps
from fxpass.report.page import records
from tests.inspect.onnx_ranks import models_of
from tests.inspect.plans import planned
from tests.passes.test_random_networks import CHANNELS, Network, blocks
from tests.properties import examples, given

Bytes = dict[str, tuple[list[int], list[int]]]  #: identifier -> bytes of every rank, exact and in displaced steps

PATCHED = sorted(name for name, strategy in PRESETS.items() if not strategy.overlaps)  #: they need no stages


def of_plan(made: Plan) -> Bytes:
    ranks = range(made.world_size)
    return {e.id: ([e.received(r) for r in ranks], [e.received(r, exact=False) for r in ranks]) for e in made.exchanges}


def of_description(made: Plan) -> Bytes:
    data = json.loads(json.dumps(made.describe()))
    return {each["id"]: (each["received"], each["received_displaced"]) for each in data["exchanges"]}


def of_json(made: Plan) -> Bytes:
    data = json.loads(to_json(made.snapshot()))
    return {each["id"]: (each["exact"], each["steady"]) for each in data["exchanges"]}


def of_report(made: Plan) -> Bytes:
    data = json.loads(json.dumps(records(made)))
    return {each["id"]: (each["exact"], each["steady"]) for each in data["exchanges"]}


def of_networkx(made: Plan) -> Bytes:
    nodes = [data for _, data in made.to_networkx().nodes(data=True) if data["kind"] == "exchange"]
    return {
        each: (list(data["exact"][each]), list(data["steady"][each])) for data in nodes for each in data["exchanges"]
    }


def of_simulation(made: Plan) -> Bytes:
    found: Bytes = {e.id: ([0] * made.world_size, [0] * made.world_size) for e in made.exchanges}
    steps = list(Steps.of(made.program, made.graph, made.world_size, find("gpu")).modes.values())
    for place, step in enumerate((steps[0], steps[-1])):
        for message in step.messages:
            for rank in range(made.world_size):
                for name, size in message.received_of(rank).items():
                    found[name][place][rank] = size
    return found


def check_onnx(made: Plan, ranks: Sequence[int], modes: Sequence[Mode] = ("exact", "steady")) -> None:
    """The puts and gets of ranks name every payload of an exact step and of a steady one, with its bytes."""
    for (rank, _), (model, program) in models_of(made, modes, ranks).items():
        exact = program.mode == "exact"
        expected, found = Counter[str](), Counter[str]()
        for each in made.exchanges:
            sent = each.declared if exact else each.declared.wire
            if exact or each.declared.repeated:
                for other in range(made.world_size):
                    expected[f"Put {each.id} {rank}>{other}"] = sent.numel(rank, other) * sent.dtype.itemsize
                    expected[f"Get {each.id} {other}>{rank}"] = sent.numel(other, rank) * sent.dtype.itemsize
        apart = 0
        for node in model.graph:
            if node.domain != "fxpass":
                continue
            attributes = {name: each.value for name, each in node.attributes.items()}
            tensors = node.inputs[1:] if node.op_type == "Put" else node.outputs[1:]
            assert list(attributes["bytes"]) == [prod(x.shape) * x.dtype.itemsize for x in tensors]  # type: ignore[union-attr, arg-type]
            if not (exact and attributes.get("last")):  # which an earlier step has sent
                apart += attributes.get("padding", 0)
                names = [f"{node.op_type} {name}" for name in attributes["exchanges"]]
                assert not found.keys() & names
                found.update(dict(zip(names, attributes["bytes"], strict=True)))
        assert found == +expected, program.mode
        assert apart == made.padding_received(rank, exact=exact)
        for each in made.exchanges:
            got = sum(size for name, size in found.items() if name.startswith(f"Get {each.id} "))
            assert got == each.received(rank, exact=exact)


def identifiers(shown: str) -> list[str]:
    return re.findall(r"^ *(x\d+\.\d+)  ", shown, re.MULTILINE)


def agree(made: Plan) -> None:
    expected = of_plan(made)
    assert of_description(made) == of_json(made) == of_report(made) == of_networkx(made) == expected
    assert of_simulation(made) == expected
    snapshot = made.snapshot()
    assert identifiers(text(snapshot, folded=False)) == list(expected)
    drawn = re.findall(r"x\d+\.\d+", dot(snapshot))
    assert set(drawn) <= set(expected)
    assert sum(map(sum, (exact for exact, _ in expected.values()))) == sum(made.bytes_by_role.values())
    gathered = [each.exchanges for each in made.gathered]
    described: list[Any] = [tuple(each["exchanges"]) for each in json.loads(json.dumps(made.describe()))["fallbacks"]]
    assert gathered == described == [each.exchanges for each in snapshot.fallbacks]
    assert sorted(sum(gathered, ())) == sorted(each.id for each in made.fallbacks)
    for rank in range(made.world_size):
        shown = made.snapshot(rank)
        graph = made.to_networkx(rank)
        messages = [data for _, data in graph.nodes(data=True) if data["kind"] == "exchange"]
        for exact, received, padding in ((True, "received", "padding"), (False, "received_steady", "padding_steady")):
            total = sum(made.bytes_received(rank, exact=exact).values())
            assert total == shown.received(exact=exact) == sum(data[received] for data in messages)
            apart = made.padding_received(rank, exact=exact)
            assert apart == sum(getattr(each, padding)[rank] for each in shown.messages)
            assert apart == sum(data[padding] for data in messages)


def random_plan(data: st.DataObject) -> Plan:
    height, width = data.draw(st.sampled_from([(8, 4), (12, 4), (16, 4)]))
    inner = [data.draw(blocks(height, width, 2)) for _ in range(data.draw(st.integers(1, 3)))]
    network = Network(inner, data.draw(st.booleans())).eval()
    inputs = [torch.randn(shape) for shape in ((2, CHANNELS, height, width), (2, 5, CHANNELS), (2, 3))]
    world, strategy = data.draw(st.integers(1, 4)), data.draw(st.sampled_from(PATCHED))
    try:
        return plan(network, *inputs, world_size=world, strategy=strategy)
    except WorldSizeError:
        reject()


@examples(25)
@given(st.data())
def test_all_outputs_agree_on_identifiers_and_bytes_of_random_programs(data: st.DataObject) -> None:
    agree(random_plan(data))


@examples(5)
@given(st.data())
def test_onnx_models_have_the_identifiers_and_bytes_of_random_programs(data: st.DataObject) -> None:
    made = random_plan(data)
    check_onnx(
        made, [data.draw(st.integers(0, made.world_size - 1))], [data.draw(st.sampled_from(["exact", "steady"]))]
    )


def test_all_outputs_agree_where_displaced_steps_send_less_and_messages_are_padded() -> None:
    for strategy in ("compressed", "pcpp", "no_sync"):
        made = planned(strategy, 3)
        agree(made)
        assert any(e.received(1) != e.received(1, exact=False) for e in made.exchanges)
    assert any(made.padding_received(rank) for rank in range(3))


def test_onnx_models_have_the_bytes_of_displaced_steps_that_send_less_and_of_padded_messages() -> None:
    made = planned("pcpp", 3)
    check_onnx(made, [1])
    assert any(made.padding_received(1, exact=exact) for exact in (True, False))
    check_onnx(planned("no_sync", 3), [0, 1])


def test_an_identifier_counts_messages_and_the_values_in_each() -> None:
    assert [each.id for each in planned().exchanges] == ["x0.0", "x1.0", "x2.0", "x2.1", "x3.0", "x4.0"]
