"""Steps as graphs: what a step does on the device is recorded once, and then launched as a whole.

A replayed graph reads and writes the addresses that it was recorded with. So inputs are copied to fixed places, the
state stays at fixed places (`StepRunner.fixed`), messages lie in symmetric memory, and outputs are copied away. A step
of a mode runs unrecorded once, which compiles its segments and makes its index tables; then it is recorded, once for
each parity of the symmetric memory. Weights that have moved drop all graphs.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ..ir.advice import warn
from ..ir.ops import Table, index_tensors_from
from ..ir.step import Mode
from .step_runner import StepRunner, copies, run_in_turns
from .symmetric_memory import SymmetricChannel, SymmetricMemory

Outputs = list[list[Tensor]]  #: of each rank
#: Records what a function does on the device; returns what it returned, and a function that does it again.
Recorder = Callable[[Callable[[], Outputs]], tuple[Outputs, Callable[[], None]]]


class StepGraphs:
    """Runs the steps of one context as graphs, for the ranks in this process.

    Args:
        runners: of these ranks: one, but for tests. Their channels are those of symmetric memory, if there are any.
        context: its number.
    """

    def __init__(self, runners: Sequence[StepRunner], context: int, device: torch.device, record: Recorder) -> None:
        self.graphs: dict[tuple[Mode, int], tuple[Outputs, Callable[[], None]]] = {}  #: by mode and parity
        self._runners = runners
        self._context = context
        self._device = device
        self._record: Recorder | None = record
        self._inputs: list[Tensor] = []
        with torch.inference_mode(False):  # later calls write to it, also outside inference mode
            self._pace = torch.zeros((), dtype=torch.float64, device=device)
        self._ended: Any = None  #: event: the last step has ended on the device
        self._ran: set[Mode] = set()  #: modes that ran unrecorded
        self._weights: Any = None  #: where those of the graphs lie
        self._tables: dict[tuple[Table, torch.device], Tensor] = {}
        for runner in runners:
            runner.fixed = True

    def run(self, weights: Sequence[Tensor], inputs: Sequence[Tensor], mode: Mode, pace: float) -> Outputs:
        """The flat outputs of a step, of each rank."""
        if self._ended is not None:  # it may have run on another stream
            torch.cuda.current_stream(self._device).wait_event(self._ended)
        if not self._inputs:
            with torch.inference_mode(False):
                self._inputs = [torch.empty_like(x, device=self._device) for x in inputs]
        for buffer, x in zip(self._inputs, inputs, strict=True):
            fill(buffer, x)
        self._pace.fill_(pace)
        places = [self._place(weight) for weight in weights]
        if places != self._weights:
            self.graphs.clear()
            self._ran.clear()  # other strides are compiled anew, which no recording may do
            self._weights = places
        memories = self._memories()
        mode = self._runners[0].canonical(mode)
        key = mode, memories[0].number % 2 if memories else 0
        if key not in self.graphs and mode in self._ran and self._record:
            self._recorded(weights, key, memories)
        if key in self.graphs:
            outputs, replay = self.graphs[key]
            replay()
            for memory in memories:
                memory.begin(memory.number + 1)
        else:
            self._ran.add(mode)
            outputs = self._step(weights, mode)
        for runner in self._runners:
            runner.count(mode)
        results = [copies(each) for each in outputs]
        if self._device.type == "cuda":
            self._ended = torch.cuda.current_stream(self._device).record_event()
        return results

    def _step(self, weights: Sequence[Tensor], mode: Mode) -> Outputs:
        with index_tensors_from(self._table):
            context = self._context
            runs = [each.start(weights, self._inputs, context, mode, self._pace) for each in self._runners]
            results = run_in_turns(runs, [each.channels(context) for each in self._runners])
            return [outputs for outputs, _ in results]

    def _recorded(self, weights: Sequence[Tensor], key: tuple[Mode, int], memories: Sequence[SymmetricMemory]) -> None:
        """Record a step, which does not run it; if that fails, warn and record no other."""
        numbers = [memory.number for memory in memories]
        assert self._record is not None
        try:
            self.graphs[key] = self._record(lambda: self._step(weights, key[0]))
        except Exception as error:
            self._record = None
            notes = "; ".join(getattr(error, "__notes__", []))
            warn(f"a step cannot be recorded as a graph, so all run without: {error} ({notes})")
        for memory, number in zip(memories, numbers, strict=True):
            memory.begin(number)

    def _memories(self) -> list[SymmetricMemory]:
        """The symmetric memory of each rank, if there are channels."""
        channels = [each.channels(self._context) for each in self._runners]
        return [ends[0].memory for ends in channels if ends and isinstance(ends[0], SymmetricChannel)]

    def _table(self, index: Table, device: torch.device) -> Tensor:
        if (index, device) not in self._tables:
            self._tables[index, device] = torch.from_numpy(index.array.copy()).to(device)
        return self._tables[index, device]

    def _place(self, weight: Tensor) -> Any:
        """Where a weight lies; its value if a graph would bake it in."""
        if weight.device != self._device:
            return repr(weight.tolist())  # equal texts also of NaN
        return weight.data_ptr(), weight.stride()


def fill(buffer: Tensor, x: Tensor) -> None:
    """Copy an input to its place on the device, also a number from the CPU: a graph would bake that in.

    Such a number becomes an argument of a kernel, for which nothing waits.
    """
    if x.ndim == 0 and x.device != buffer.device:
        buffer.fill_(x.item())
    else:
        buffer.copy_(x)


def cuda_recorder(device: torch.device) -> Recorder:
    """Records CUDA graphs, all on one stream and in one pool of memory."""
    stream = torch.cuda.Stream(device)
    pool = torch.cuda.graph_pool_handle()

    def record(function: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        gc.collect()  # to free device memory while a graph is recorded would make it invalid
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            # other threads may go on to use the device meanwhile
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                outputs = function()
            except BaseException:
                with suppress(RuntimeError):  # the capture has become invalid; the first error says why
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.current_stream(device).wait_stream(stream)
        return outputs, graph.replay

    return record
