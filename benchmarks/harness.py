"""What the benchmarks share: processes, stepping through a plan, turns, statistics."""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fxpass
from benchmarks.models import MODELS
from fxpass.capture import Call
from fxpass.capture.structure import WeightTable
from fxpass.ir.exchange import Payloads
from fxpass.ir.inputs import moving
from fxpass.ir.step import EXACT, Step
from fxpass.runtime.channels import Channel
from fxpass.runtime.distributed import DistributedExecutor
from fxpass.runtime.executor import Question, device_of
from fxpass.runtime.step_runner import StepRunner, as_tensor, drive

RANK_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
DRIFT = 0.02  #: change of the sample per step, in standard deviations
RESAMPLED = 10_000  #: bootstrap samples
DISPLACED = Step(exact=False, pace=1.0)  #: evenly spaced timesteps, so that values are extrapolated
CEILING = 1  #: the context of steps without exchanges


def on_two_processes(module: str, reports: Iterable[str]) -> None:
    """Start `python -m module` again as two torchrun processes; inside these, print what rank 0 reports.

    Args:
        reports: created one by one, on both ranks.
    """
    if "RANK" in os.environ:
        take_part(reports)
        return
    from torch.distributed.run import main as torchrun

    os.environ |= RANK_ENVIRONMENT
    torchrun(["--nproc-per-node", "2", "-m", module, *sys.argv[1:]])


def take_part(reports: Iterable[str]) -> None:
    """Join the process group that the environment describes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for report in reports:
        if dist.get_rank() == 0:
            print(report, flush=True)
    dist.destroy_process_group()


class Stepper:
    """This rank's program of a plan. Each step gets another sample, equal on all ranks."""

    def __init__(
        self, executor: DistributedExecutor, plan: fxpass.Plan, model: nn.Module, inputs: dict[str, Any]
    ) -> None:
        self.plan = plan
        self.executor = executor
        self.weights = WeightTable(model, list(plan.program.weights.values())).tensors()
        self._tensors = list(Call.of(model, (), inputs).tensors)
        executor.begin(device_of(self._tensors))
        self.loaded = executor.load(plan, self.weights, self._tensors)
        found = moving(plan.program)
        self._place = found.sample if found is not None else 0
        sample = self._tensors[self._place]
        noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(1))
        self._samples = itertools.cycle([sample + i * DRIFT * noise for i in range(8)])

    def tensors(self) -> list[Tensor]:
        """The next step's inputs."""
        self._tensors[self._place] = next(self._samples)
        return self._tensors

    def exact(self) -> list[Tensor]:
        return self.step(EXACT)

    def displaced(self) -> list[Tensor]:
        return self.step(DISPLACED)

    def step(self, step: Step) -> list[Tensor]:
        """Run a step as a parallel module does: the ranks compare their inputs first."""
        tensors = self.tensors()
        return self.loaded.run(self.weights, tensors, self.loaded.decide(tensors, Question((), lambda _: step)))

    def without_exchanges(self, step: Step) -> Callable[[], list[Tensor]]:
        """This rank's program without exchanges, in the mode of `step`; see `without_exchanges` below."""
        return without_exchanges(
            self.loaded.steps.runners[0], self.weights, self.tensors, replace(step, context=CEILING)
        )

    def received(self, step: Callable[[], Any]) -> dict[str, int]:
        """Bytes that this rank receives in one `step`, by role."""
        before = dict(self.executor.traffic)
        step()
        change = {role: count - before.get(role, 0) for role, count in self.executor.traffic.items()}
        return {role: count for role, count in change.items() if count}


class StaticChannel:
    """Another channel, until `freeze`: then `put` does nothing, and `get` returns the last receive buffers again."""

    lends = False

    def __init__(self, channel: Channel) -> None:
        self.channel: Channel | None = channel
        self.buffers: list[Tensor] = []

    def put(self, packed: Sequence[Payloads]) -> None:
        if self.channel is not None:
            self.channel.put(packed)

    def ready(self) -> bool:
        return self.channel is None or self.channel.ready()

    def get(self) -> list[Tensor]:
        if self.channel is not None:
            self.buffers = self.channel.get()
        return list(self.buffers)

    def close(self) -> None:
        if self.channel is not None:
            self.channel.close()

    def freeze(self) -> None:
        self.close()
        self.channel = None


def without_exchanges(
    runner: StepRunner, weights: Sequence[Tensor], inputs: Callable[[], Sequence[Tensor]], step: Step
) -> Callable[[], list[Tensor]]:
    """A rank's program without exchanges: the same operators, but no message is sent, copied or awaited.

    Runs three steps with exchanges, on all ranks at once; later ones get the messages of the third again.

    Args:
        inputs: those of the next step.
        step: what is run; its context must be one that no other step uses.
    """
    channels = [StaticChannel(channel) for channel in runner.channels(step.context)]

    def run(step: Step) -> list[Tensor]:
        pace = as_tensor(step.pace)
        return drive(runner.start(weights, inputs(), step.context, runner.mode(step), pace), channels)[0]

    for each in (replace(step, exact=True), step, step):
        run(each)
    for channel in channels:
        channel.freeze()
    return lambda: run(step)


@dataclass(frozen=True)
class Contender:
    """One of the programs that alternate."""

    step: Callable[[], Any]
    settle: Callable[[], Any] | None = None  #: run after each turn: receives messages that the last step left in flight

    def turn(self, steps: int, before: int = 1) -> float:
        """Seconds per step on the slower rank, over `steps` steps that directly follow `before` others."""
        dist.barrier()
        for _ in range(before):
            self.step()
        began = time.perf_counter()
        for _ in range(steps):
            self.step()
        seconds = torch.tensor((time.perf_counter() - began) / steps, dtype=torch.float64)
        if self.settle:
            self.settle()
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return seconds.item()


def steppers(name: str, strategies: tuple[str, ...]) -> tuple[nn.Module, dict[str, Stepper]]:
    """Load a model of `MODELS`, and plan it for two ranks with each strategy."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model.eval()
    program = fxpass.capture(model, **inputs)
    executor = DistributedExecutor(2)
    plans = {strategy: fxpass.plan(program, world_size=2, strategy=strategy) for strategy in strategies}
    return model, {strategy: Stepper(executor, plan, model, inputs) for strategy, plan in plans.items()}


def contenders(ready: dict[str, Stepper]) -> dict[str, Contender]:
    """Contenders that run steady steps, by strategy."""
    found: dict[str, Contender] = {}
    for strategy, stepper in ready.items():
        stepper.exact()
        stale = not stepper.plan.strategy.exact
        found[strategy] = Contender(stepper.displaced, stepper.exact) if stale else Contender(stepper.exact)
    return found


def in_turns(contenders: dict[str, Contender], turn: int, steps: int, before: int = 1) -> dict[str, float]:
    """One turn of each contender, starting with another one each time: seconds per step, after `before` others."""
    names = list(contenders)
    first = turn % len(names)
    return {name: contenders[name].turn(steps, before) for name in [*names[first:], *names[:first]]}


def in_rounds(contenders: dict[str, Contender], rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds per step of each contender in each round, after one round to warm up."""
    found = [in_turns(contenders, turn, steps) for turn in range(rounds + 1)][1:]
    return {key: [each[key] for each in found] for key in contenders}


def spread(values: Sequence[float]) -> str:
    """Median, minimum and maximum as text."""
    return f"{statistics.median(values):7.3f}  ({min(values):.3f}–{max(values):.3f})"


def paired(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float, float]:
    """The median over rounds of their ratios, and its 95 % bootstrap interval."""
    ratios = np.asarray(numerators) / np.asarray(denominators)
    drawn = np.random.default_rng(0).choice(ratios, (RESAMPLED, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return float(np.median(ratios)), float(low), float(high)


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> str:
    """`paired` as text."""
    middle, low, high = paired(numerators, denominators)
    return f"{middle:.3f}  (95 %: {low:.3f}–{high:.3f})"


def heading(name: str, model: nn.Module, rounds: str) -> str:
    """The first line of a report."""
    parameters = sum(p.numel() for p in model.parameters())
    return f"{name}: {parameters / 1e6:.0f} M parameters, torch {torch.__version__}, {rounds}"
