"""Steps as graphs: what a step does on the device is recorded once, and then launched as a whole.

A replayed graph reads and writes the addresses that it was recorded with. So inputs are copied to fixed places, the
state stays at fixed places (`StepRunner.fixed`), messages lie in symmetric memory, and outputs are copied away. A step
of a mode runs unrecorded once, which compiles its segments and makes its index tables; then it is recorded, once for
each parity of the symmetric memory. Weights that have moved drop all graphs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..ir.advice import FxpassWarning
from ..ir.ops import Table, index_tensors_from
from ..ir.step import Mode
from .step_runner import StepRunner, run_in_turns
from .symmetric_memory import SymmetricChannel, SymmetricMemory

Outputs = list[list[Tensor]]  #: of each rank
#: Records what a function does on the device; returns what it returned, and a function that does it again.
Recorder = Callable[[Callable[[], Outputs]], tuple[Outputs, Callable[[], None]]]


@dataclass
class FixedContext:
    """What the graphs of a context have in common."""

    inputs: list[Tensor]
    pace: Tensor
    ran: set[Mode] = field(default_factory=set)  #: modes that ran unrecorded
    weights: Any = None  #: where those of the graphs lie
    graphs: dict[tuple[Mode, int], tuple[Outputs, Callable[[], None]]] = field(default_factory=dict)


class StepGraphs:
    """Runs steps of the ranks in this process as graphs.

    Args:
        runners: of these ranks: one, but for tests. Their channels are those of symmetric memory, if there are any.
    """

    def __init__(self, runners: Sequence[StepRunner], device: torch.device, record: Recorder) -> None:
        self._runners = runners
        self._device = device
        self._record: Recorder | None = record
        self._contexts: dict[int, FixedContext] = {}
        self._tables: dict[tuple[Table, torch.device], Tensor] = {}
        for runner in runners:
            runner.fixed = True

    def run(
        self, weights: Sequence[Tensor], inputs: Sequence[Tensor], context: int, mode: Mode, pace: float
    ) -> Outputs:
        """The flat outputs of a step, of each rank."""
        here = self._contexts.get(context)
        if here is None:
            pace_here = torch.zeros((), dtype=torch.float64, device=self._device)
            here = self._contexts[context] = FixedContext([self._fixed(x) for x in inputs], pace_here)
        for buffer, x in zip(here.inputs, inputs, strict=True):
            fill(buffer, x)
        here.pace.fill_(pace)
        places = [self._place(weight) for weight in weights]
        if places != here.weights:
            here.graphs.clear()
            here.weights = places
        memories = self._memories(context)
        key = mode, memories[0].number % 2 if memories else 0

        def step() -> Outputs:
            with index_tensors_from(self._table):
                runs = [each.start(weights, here.inputs, context, mode, here.pace) for each in self._runners]
                channels = [each.channels(context) for each in self._runners]
                return [outputs for outputs, _ in run_in_turns(runs, channels)]

        if key not in here.graphs and mode in here.ran and self._record:
            numbers = [memory.number for memory in memories]
            try:
                here.graphs[key] = self._record(step)
            except Exception as error:
                self._record = None
                notes = "; ".join(getattr(error, "__notes__", []))
                warnings.warn(
                    f"a step cannot be recorded as a graph, so all run without: {error} ({notes})",
                    FxpassWarning,
                    stacklevel=2,
                )
            for memory, number in zip(memories, numbers, strict=True):  # recording does not run the step
                memory.begin(number)
        if key not in here.graphs:
            here.ran.add(mode)
            return [copies(outputs) for outputs in step()]
        outputs, replay = here.graphs[key]
        replay()
        for memory in memories:
            memory.begin(memory.number + 1)
        return [copies(each) for each in outputs]

    def close(self) -> None:
        """Drop the graphs. Memory that they read may be freed only after that."""
        self._contexts.clear()
        self._tables.clear()

    def _memories(self, context: int) -> list[SymmetricMemory]:
        """The symmetric memory of each rank, if there are channels."""
        channels = [each.channels(context) for each in self._runners]
        return [ends[0].memory for ends in channels if ends and isinstance(ends[0], SymmetricChannel)]

    def _table(self, index: Table, device: torch.device) -> Tensor:
        if (index, device) not in self._tables:
            self._tables[index, device] = torch.from_numpy(index.array.copy()).to(device)
        return self._tables[index, device]

    def _fixed(self, x: Tensor) -> Tensor:
        """A place for an input; on the device also for numbers, which callers keep on the CPU: graphs bake those in."""
        return torch.empty_like(x, device=self._device)

    def _place(self, weight: Tensor) -> Any:
        """Where a weight lies; its value if a graph would bake it in."""
        if weight.device != self._device:
            return weight.tolist()
        return weight.data_ptr(), weight.stride()


def fill(buffer: Tensor, x: Tensor) -> None:
    """Copy an input to its place. A number from the CPU becomes an argument of a kernel, for which nothing waits."""
    if x.ndim == 0 and x.device != buffer.device:
        buffer.fill_(x.item())
    else:
        buffer.copy_(x)


def copies(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [each.clone() for each in outputs]


def cuda_recorder(device: torch.device) -> Recorder:
    """Records CUDA graphs, all on one stream and in one pool of memory."""
    stream = torch.cuda.Stream(device)
    pool = torch.cuda.graph_pool_handle()

    def record(function: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(device))
        # other threads may go on to use the device meanwhile
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            outputs = function()
        return outputs, graph.replay

    return record
