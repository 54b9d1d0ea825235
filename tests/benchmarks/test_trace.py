"""The records of two ranks become one table and one file."""

import json
from typing import Any

import torch

import fxpass
from benchmarks.harness import DISPLACED
from benchmarks.trace import Trace
from fxpass.capture import Call
from fxpass.capture.structure import WeightTable
from fxpass.ir.step import EXACT
from fxpass.models.small import case
from fxpass.passes.lower_comm import StepPrograms
from fxpass.predict.recorded import Flight, Log, Span, recorded
from fxpass.runtime.channels import RankChannel
from fxpass.runtime.lockstep import LockstepExecutor
from fxpass.runtime.step_runner import as_tensor, run_in_turns


def log(lead: float, sender: int) -> Log:
    """The log of two steps of one second with one message each, on a rank that is `lead` seconds ahead of `sender`."""
    first = Flight("x0", "halo", {"x0.0": 1000}, [sender], 0.3 - lead, 0.4 - lead, awaited=1.3, taken=1.35)
    second = Flight("x0", "halo", {"x0.0": 1000}, [sender], 1.4 - lead, 1.5 - lead)
    exchanges = [Span("put x0", "exchange", *times, role="halo") for times in ((0.2, 0.4), (1.3, 1.5))]
    return Log([Span("one", "step", 0.0, 1.0), Span("two", "step", 1.0, 2.0)], exchanges, [first, second])


def test_through_shared_memory_a_message_arrives_when_its_sender_has_written_it() -> None:
    trace = Trace([log(0.0, 1), log(0.1, 0)])
    assert [flight.arrived for flight in trace.logs[0].flights] == [0.4 - 0.1, 1.5 - 0.1]
    assert [flight.arrived for flight in trace.logs[1].flights] == [0.4, 1.5]


def test_the_table_has_the_duration_of_each_wait() -> None:
    table = Trace([log(0.0, 1), log(0.1, 0)]).table().splitlines()
    assert table[1].split() == ["x0", "halo", "1.0", "400.0", "300.0", "1300.0", "50.00"]
    assert "1 messages are awaited a step later, 1 of them had arrived by then" in table[2]
    assert table[-1].split() == ["halo", "50.0", "100.0", "200.0"]


def test_the_file_has_a_bar_for_each_message_of_each_rank() -> None:
    events = json.loads(Trace([log(0.0, 1), log(0.1, 0)]).chrome())["traceEvents"]
    bars = [(event["pid"], event["name"], event["args"]) for event in events if event.get("cat") == "message"]
    assert bars == [(0, "x0 halo", {"x0.0": 1000})] * 2 + [(1, "x0 halo", {"x0.0": 1000})] * 2


@torch.no_grad()
def test_a_watched_step_gives_the_same_output_and_records_every_message_and_operator_of_an_exchange() -> None:
    model: Any = case("unet_sd").build()
    given = case("unet_sd").inputs(rows=32, module=model)
    plan = fxpass.plan(fxpass.capture(model, **given), world_size=2, strategy="displaced")
    weights = WeightTable(model, list(plan.program.weights.values())).tensors()
    inputs = Call.of(model, (), given).tensors
    plain = LockstepExecutor(2).load(plan, weights, inputs)
    log = Log()
    specs = StepPrograms(plan.graph, 0).channels
    ends = [RankChannel.of_ranks(spec, range(2), torch.device("cpu")) for spec in specs]
    ranks = [recorded(plan, [of_ranks[rank] for of_ranks in ends], rank, (log, Log())[rank]) for rank in (0, 1)]
    for step in (EXACT, DISPLACED, DISPLACED):
        log.clear()
        runs = [rank.start(weights, inputs, 0, rank.mode(step), as_tensor(step.pace)) for rank in ranks]
        found = run_in_turns(runs, [rank.channels(0) for rank in ranks])
        assert torch.equal(found[0][0][0], plain.run(weights, inputs, step)[0])
    acts = [span.name.split()[0] for span in log.spans if span.category in ("exchange", "wait")]
    assert acts.count("put") == acts.count("get") == acts.count("wait") == len(log.flights) > 1
    assert {span.role for span in log.spans} - {""} == {flight.role for flight in log.flights}
    awaited = [flight.node for flight in log.flights if flight.awaited is not None]
    assert awaited == [log.flights[-1].node]  # the output; what else was sent is read in the next step
