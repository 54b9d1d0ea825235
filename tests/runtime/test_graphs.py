"""Steps that are recorded once and replayed equal those that run operator by operator, bit for bit."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxpass
from fxpass.capture import Call
from fxpass.capture.structure import WeightTable
from fxpass.ir.step import EXACT, Mode, Step
from fxpass.models.small import cases
from fxpass.runtime.graphs import Outputs, StepGraphs
from fxpass.runtime.lockstep import LockstepExecutor
from fxpass.runtime.step_runner import StepRunner, as_tensor
from tests.runtime.tape import symmetric_channels, tape
from tests.runtime.test_step_runner import STEPS, WORLD, planned

CPU = torch.device("cpu")


def open_symmetric(runners: Sequence[StepRunner], context: int) -> None:
    """Give a context of all ranks channels of symmetric memory."""
    for runner, ends in zip(runners, symmetric_channels(runners[0].specs, WORLD), strict=True):
        runner.open(context, ends)


class Ranks:
    """All ranks of a plan over symmetric memory, their steps on a tape; and lockstep."""

    def __init__(self, name: str, strategy: str, record: Callable[..., Any] = tape, rows: int = 32) -> None:
        self.model, self.given, self.plan = planned(name, strategy, rows)
        self.runners = [StepRunner.of(self.plan, rank, CPU, Counter()) for rank in range(WORLD)]
        self.graphs = {context: StepGraphs(self.runners, context, CPU, record) for context in (0, 1)}
        for context in self.graphs:
            open_symmetric(self.runners, context)
        self.lockstep: Any = None
        self.turn = 0

    def step(self, kind: str, pace: float, context: int = 0) -> tuple[Outputs, Outputs]:
        """The outputs of each rank: of recorded steps, and of lockstep."""
        key = next(name for name, x in self.given.items() if x.is_floating_point() and x.ndim > 2)
        drift = torch.randn(self.given[key].shape, generator=torch.Generator().manual_seed(4))
        self.turn += 1
        tensors = Call.of(self.model, (), self.given | {key: self.given[key] + 0.1 * self.turn * drift}).tensors
        weights = WeightTable(self.model, list(self.plan.program.weights.values())).tensors()
        self.lockstep = self.lockstep or LockstepExecutor(WORLD).load(self.plan, weights, tensors)
        step = EXACT if kind == "E" or self.plan.exact_steps is None else Step(0, False, pace)
        step = Step(context, step.exact, step.pace)
        with torch.no_grad():
            modes: list[Mode] = [runner.mode(step) for runner in self.runners]
            found = self.graphs[context].run(weights, tensors, modes[0], step.pace)
            return found, self.lockstep.run_all(weights, tensors, step)

    @property
    def replayed(self) -> set[tuple[str, int]]:
        """Mode and parity of the graphs that there are."""
        return {key for each in self.graphs.values() for key in each.graphs}


def same(pair: tuple[Outputs, Outputs]) -> bool:
    ours, theirs = pair
    return all(torch.equal(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("strategy", ["sync", "displaced", "compressed", "pcpp", "stale_gn", "no_sync"])
@pytest.mark.parametrize("name", ["block", "flux"])
def test_recorded_steps_of_every_mode_equal_lockstep_bit_for_bit(name: str, strategy: str) -> None:
    ranks = Ranks(name, strategy)
    assert all(same(ranks.step(*each)) for each in STEPS * 3)
    modes = {"exact"} if strategy == "sync" else {"exact", "first", "steady", "first unpaced", "steady unpaced"}
    assert {mode for mode, _ in ranks.replayed} <= modes
    assert {("exact", 0), ("exact", 1)} <= ranks.replayed
    assert strategy == "sync" or {("steady", 0), ("steady", 1)} <= ranks.replayed


SLICE = ("wan", "vae")  #: of the small models, in every run


@pytest.mark.parametrize(
    "name", [pytest.param(each.name, marks=[] if each.name in SLICE else pytest.mark.slow) for each in cases]
)
def test_steps_of_every_small_model_can_be_recorded(name: str) -> None:
    ranks = Ranks(name, "displaced", rows=16)
    # one graph of each kind: a tape keeps every value of a step
    assert all(same(ranks.step(*each)) for each in [("E", 0.0), ("E", 0.0), ("D", 1.0), ("D", 1.0), ("D", 1.0)])
    assert len(ranks.replayed) >= 2


class Resampled(nn.Module):
    """Bicubic and bilinear interpolation: sums of rows with static weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        h = functional.interpolate(self.conv(sample) + timestep, scale_factor=2.0, mode="bicubic")
        return functional.interpolate(self.conv(h), scale_factor=0.5, mode="bilinear")


def test_steps_of_a_model_that_interpolates_can_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Resampled().eval()
    given: dict[str, Any] = {"sample": torch.randn(1, 4, 36, 8), "timestep": torch.tensor([0.5])}
    plan = fxpass.plan(model, **given, world_size=WORLD, strategy="displaced")
    monkeypatch.setattr("tests.runtime.test_graphs.planned", lambda *_: (model, given, plan))
    ranks = Ranks("resampled", "displaced")
    assert all(same(ranks.step(*each)) for each in [("E", 0.0), ("E", 0.0), ("D", 1.0), ("D", 1.0), ("D", 1.0)])
    assert len(ranks.replayed) >= 2


def test_contexts_that_take_turns_have_graphs_and_messages_of_their_own() -> None:
    ranks = Ranks("block", "displaced")
    for each in STEPS * 2:
        assert same(ranks.step(*each, context=0))
        assert same(ranks.step(*each, context=1))
    assert [len(each.graphs) >= 2 for each in ranks.graphs.values()] == [True, True]


def test_weights_that_change_in_place_are_seen_and_weights_that_move_are_recorded_again() -> None:
    ranks = Ranks("block", "displaced")
    for each in STEPS[:6] * 2:
        ranks.step(*each)
    before = set(ranks.replayed)
    assert len(before) >= 4
    weight: Any = ranks.model.get_parameter("conv_in.weight")
    state: Tensor = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.mul_(1.1)
        assert same(ranks.step("D", 1.0))
        assert ranks.replayed >= before
        weight.data = weight.data.clone()
        assert same(ranks.step("D", 1.0))
        assert len(ranks.replayed) <= 1
        assert all(same(ranks.step(*each)) for each in STEPS)
    finally:
        weight.data = state


def test_a_step_that_cannot_be_recorded_runs_on_without_a_graph_and_says_so_once() -> None:
    def fails(function: Callable[[], Outputs]) -> Any:
        function()
        error = RuntimeError("operation not permitted when stream is capturing")
        error.add_note("in fxpass rank 0, at item_3 (blocks.0)")
        raise error

    ranks = Ranks("block", "sync", fails)
    assert same(ranks.step("E", 0.0))
    with pytest.warns(fxpass.FxpassWarning, match=r"cannot be recorded.*at item_3 \(blocks.0\)"):
        ranks.step("E", 0.0)


@pytest.mark.parametrize("what", ["reads", "makes"])
def test_the_tape_refuses_what_a_graph_would_bake_in(what: str) -> None:
    x = torch.ones(3)
    with pytest.raises(AssertionError, match="on the host" if what == "reads" else "Python numbers"):
        tape(lambda: [[x * x.sum().item()]] if what == "reads" else [[x * torch.tensor([1.0, 2.0, 3.0])]])


def test_a_tape_does_again_what_it_recorded() -> None:
    x, total = torch.ones(3), torch.zeros(())

    def step() -> Outputs:
        total.add_(x.sum())
        return [[x.view(3, 1) * 2]]

    outputs, replay = tape(step)
    assert total.item() == 0  # recording does not count
    x.fill_(5)
    for _ in range(2):
        replay()
    assert total.item() == 30
    assert outputs[0][0].flatten().tolist() == [10, 10, 10]


class Racing:
    """All ranks of a plan over symmetric memory; each goes on as soon as messages let it, in an order drawn at random.

    So a rank may be a step ahead of another, and write to memory from which the other still reads.
    """

    def __init__(self, name: str, strategy: str, seed: int) -> None:
        self.model, self.given, self.plan = planned(name, strategy, 32)
        self.runners = [StepRunner.of(self.plan, rank, CPU, Counter()) for rank in range(WORLD)]
        open_symmetric(self.runners, 0)
        self.chance = random.Random(seed)

    def run(self, steps: Sequence[tuple[str, float]]) -> tuple[list[Outputs], list[Outputs]]:
        """The outputs of each step on each rank; and of lockstep."""
        key = next(name for name, x in self.given.items() if x.is_floating_point() and x.ndim > 2)
        drift = torch.randn(self.given[key].shape, generator=torch.Generator().manual_seed(4))
        calls = [
            Call.of(self.model, (), self.given | {key: self.given[key] + 0.1 * k * drift}).tensors
            for k in range(len(steps))
        ]
        weights = WeightTable(self.model, list(self.plan.program.weights.values())).tensors()
        loaded = LockstepExecutor(WORLD).load(self.plan, weights, calls[0])
        taken = [
            EXACT if kind == "E" or self.plan.exact_steps is None else Step(0, False, pace) for kind, pace in steps
        ]
        found: list[Outputs] = [[[] for _ in range(WORLD)] for _ in steps]

        def rank(number: int) -> Iterator[None]:
            runner = self.runners[number]
            ends = runner.channels(0)
            for k, step in enumerate(taken):
                run = runner.start(weights, calls[k], 0, runner.mode(step), as_tensor(step.pace))
                received = None
                while True:
                    try:
                        act, channel, packed = run.send(received)
                    except StopIteration as stop:
                        yield  # the others may write before the outputs are copied
                        found[k][number] = [each.clone() for each in stop.value[0]]
                        break
                    received = None
                    if act == "put":
                        ends[channel].put(packed)
                    else:
                        while not ends[channel].ready():
                            yield
                        received = ends[channel].get()
                    yield

        with torch.no_grad():
            running = [rank(number) for number in range(WORLD)]
            favourite = 0  # goes on alone for a while
            while running:
                if self.chance.random() < 0.02:
                    favourite = self.chance.randrange(WORLD)
                turn = running[favourite % len(running)] if self.chance.random() < 0.9 else self.chance.choice(running)
                try:
                    next(turn)
                except StopIteration:
                    running.remove(turn)
            return found, [loaded.run_all(weights, call, step) for call, step in zip(calls, taken, strict=True)]


@pytest.mark.parametrize("strategy", ["sync", "displaced", "compressed", "pcpp", "corrected_async_gn"])
@pytest.mark.parametrize("name", ["block", "flux"])
def test_ranks_that_are_ahead_do_not_write_where_others_still_read(name: str, strategy: str) -> None:
    for seed in range(1 if name == "flux" else 3):
        found, expected = Racing(name, strategy, seed).run(STEPS * 2)
        for k, pair in enumerate(zip(found, expected, strict=True)):
            assert same(pair), f"step {k}"


class ReadsLate(nn.Module):
    """Its last operator reads a value that was gathered for an earlier one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        rows = (self.first(sample) + timestep).flatten(1)
        ordered = rows.sort(1).values
        wanted = self.second((rows + ordered).view_as(sample)).flatten(1)
        return torch.searchsorted(rows, wanted)


def test_what_the_end_of_a_step_reads_of_earlier_messages_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = ReadsLate().eval()
    given: dict[str, Any] = {"sample": torch.randn(1, 4, 36, 8), "timestep": torch.tensor([0.5])}
    plan = fxpass.plan(model, **given, world_size=WORLD, strategy="sync")
    monkeypatch.setattr("tests.runtime.test_graphs.planned", lambda *_: (model, given, plan))
    for seed in range(3):
        found, expected = Racing("reads late", "sync", seed).run(STEPS)
        for k, pair in enumerate(zip(found, expected, strict=True)):
            assert same(pair), f"step {k}"
