"""What a plan takes on a target: the time of its steps, the time of a generation, the memory of a device."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import fx

from ..ir.comm import kept_bytes
from ..ir.garbage import collection_paused
from ..ir.mesh import Placement
from ..ir.program import Program, exchanges_of
from ..ir.step import Mode, StepProgram
from ..ir.strategy import Strategy
from ..passes.lower_comm import StepPrograms
from ..passes.targets import Target
from .events import Step, step_of
from .memory import Memory, alive, weights_of
from .placed import on_processes
from .price import Figures, Prices
from .simulate import Elapsed, Simulation


@dataclass(frozen=True)
class StepTime:
    """One step, in seconds.

    Attributes:
        seconds: from its begin until the last rank has ended.
        launching: in which the host of each rank launches kernels.
        compute: the kernels of the rank that computes longest.
        exposed: what the rank that waits longest waits for messages, or copies them itself.
    """

    seconds: float
    launching: float
    compute: float
    exposed: float


@dataclass(frozen=True)
class Prediction:
    """What a plan takes on a target.

    Attributes:
        world: the number of processes.
        graphs: whether kernels are launched together, as CUDA graphs do, and not one by one by the host.
        exact: an exact step.
        steady: a displaced step after displaced steps; None if all steps are exact.
        exact_steps: the number of exact steps at the beginning and at the end of a generation; None if all are.
        memories: of each process.
    """

    target: Target
    world: int
    strategy: Strategy
    graphs: bool
    exact: StepTime
    steady: StepTime | None
    memories: tuple[Memory, ...]

    @property
    def memory(self) -> Memory:
        """Of the process that needs most."""
        return max(self.memories, key=lambda each: each.total)

    @property
    def exact_steps(self) -> tuple[int, int] | None:
        if self.steady is None:
            return None
        return max(1, self.strategy.warmup_steps), self.strategy.cooldown_steps

    def generation(self, steps: int) -> float:
        """Seconds of a generation of so many steps, in which the model is called once a step."""
        if self.steady is None or self.exact_steps is None:
            return steps * self.exact.seconds
        exact = min(steps, sum(self.exact_steps))
        return exact * self.exact.seconds + (steps - exact) * self.steady.seconds

    @property
    def fits(self) -> bool | None:
        """Whether the device has enough memory; None if its memory is not known."""
        available = self.target.device.memory
        return self.memory.total <= available if available else None

    def describe(self, steps: int) -> dict[str, Any]:
        """The prediction as plain data, for JSON; times in seconds, memory in bytes.

        Args:
            steps: of a generation.
        """
        return {
            "target": self.target.name,
            "ranks": self.world,
            "strategy": self.strategy.name,
            "graphs": self.graphs,
            "exact": asdict(self.exact),
            "steady": asdict(self.steady) if self.steady is not None else None,
            "steps": steps,
            "seconds": self.generation(steps),
            "memory": asdict(self.memory) | {"total": self.memory.total, "fits": self.fits},
        }


@dataclass(frozen=True)
class Steps:
    """The steps of all ranks, priced for a target.

    Attributes:
        memories: of each process.
        process: the one that needs most memory.
        alive: bytes of activations there while each node of the step program runs, by mode.
    """

    modes: dict[Mode, Step]
    memories: tuple[Memory, ...]
    process: int
    alive: dict[Mode, Figures]

    @property
    def memory(self) -> Memory:
        """Of the process that needs most."""
        return self.memories[self.process]

    @staticmethod
    @collection_paused()
    def of(
        program: Program,
        graph: fx.Graph,
        world: int,
        target: Target,
        *,
        graphs: bool = False,
        prices: Prices | None = None,
        placement: Placement | None = None,
        speeds: tuple[float, ...] = (),
    ) -> Steps:
        """Price the step programs of a scheduled graph.

        Args:
            placement: which process runs which ranks, in turn; None: each has one.
            speeds: of the processes, relative to the target; (): all have its speed.
            program: the program on whole tensors.
            graphs: kernels are launched together, as CUDA graphs do.
            prices: those of the target's device for so many ranks, where other plans have filled them.
        """
        prices = prices or Prices(target.device, world)
        programs = StepPrograms(graph, 0, every=True)
        launch = 0.0 if graphs else target.device.launch
        wanted: tuple[Mode, ...] = ("exact", "steady")
        lowered: dict[Mode, StepProgram] = {programs.canonical(mode): programs[mode] for mode in wanted}
        steps: dict[Mode, Step] = {}
        for mode, each in lowered.items():
            steps[mode] = step_of(each, graph, prices, target.link, launch)
        held: dict[Mode, Figures] = {mode: alive(each, program.inputs, prices) for mode, each in lowered.items()}
        state = np.array([sum(kept_bytes(e, rank) for _, e in exchanges_of(graph)) for rank in range(world)])
        placement = placement or Placement.one_each(world)
        if placement.several or speeds:
            fast = speeds or (1.0,) * placement.processes
            steps = {mode: on_processes(step, placement, fast) for mode, step in steps.items()}
            state = np.array(placement.sums(state.tolist()))
            held = {mode: np.array([placement.sums(each) for each in found]) for mode, found in held.items()}
        activations: Figures = np.maximum.reduce([each.max(0) for each in held.values()])
        memories = tuple(
            Memory(weights_of(program, graph, ranks), int(state[process]), int(activations[process]))
            for process, ranks in enumerate(placement)
        )
        most = max(range(len(memories)), key=lambda process: memories[process].total)
        own: dict[Mode, Figures] = {mode: each[:, most] for mode, each in held.items()}
        return Steps(steps, memories, most, own)

    def predict(self, strategy: Strategy, target: Target, *, graphs: bool = False) -> Prediction:
        """Simulate them. Arguments as they were for `of`."""
        simulation = Simulation(len(self.memories), target.link)
        exact = _taken(simulation, self.modes["exact"])
        steady = None
        if displaced := [step for mode, step in self.modes.items() if mode != "exact"]:
            simulation.settle(displaced[0])
            steady = _taken(simulation, displaced[0])
        return Prediction(target, len(self.memories), strategy, graphs, exact, steady, self.memories)


def predict(
    program: Program,
    graph: fx.Graph,
    world: int,
    strategy: Strategy,
    target: Target,
    *,
    graphs: bool = False,
    prices: Prices | None = None,
    placement: Placement | None = None,
    speeds: tuple[float, ...] = (),
) -> Prediction:
    """Predict the steps of a plan on a target. Arguments as of `Steps.of`."""
    steps = Steps.of(program, graph, world, target, graphs=graphs, prices=prices, placement=placement, speeds=speeds)
    return steps.predict(strategy, target, graphs=graphs)


def _taken(simulation: Simulation, step: Step) -> StepTime:
    began = simulation.stream.max()
    elapsed: Elapsed = simulation.step(step)
    longest = (float(each.max()) for each in (elapsed.busy, elapsed.exposed))
    return StepTime(float(elapsed.ended.max() - began), elapsed.launching, *longest)
