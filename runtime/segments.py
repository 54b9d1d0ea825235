"""compile=True: Inductor compiles what a step does between its puts and gets.

Each segment is compiled when it first runs, with the inputs that it is given, once for all places in all modes where
the same operators with the same static arguments meet inputs of the same shapes, strides and dtypes: the blocks of a
model that repeats one block share one compiled segment. Index tables are inputs, so that ranks that differ by them
alone share the code that Inductor keeps on disk.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ..ir.code import Form, Segment, StepCode
from ..ir.ops import Table, index_tensor, index_tensors_from
from ..ir.progress import say
from ..ir.step import ChannelSpec
from . import precompile
from .executor import Report

log = logging.getLogger("fxpass")
ALIGNED = 16  #: bytes: Inductor reads vectors of this size where a tensor begins at a multiple of it
FORMS = 8  #: of the inputs of a segment, which are kept: weights whose strides keep changing would make ever more
_compiling = threading.Lock()  # torch traces in one thread at a time


Compiled = Callable[[list[Tensor]], Sequence[Any]]  #: takes the list of its inputs, which it empties


class Compiler:
    """The compiled segments of one rank of one plan.

    Args:
        processes: how many compile at once before a step first runs; default: what the machine's cores allow.
        sharing: the ranks that share these cores.
    """

    def __init__(self, rank: int, processes: int | None = None, sharing: int = 1) -> None:
        self.rank = rank
        self._sharing = sharing
        self._processes = processes
        self.report: Report | None = None  #: what has been compiled so far
        self._compiled: dict[Segment, dict[Any, Compiled]] = {}  #: by the form of the inputs, the oldest first
        self._of: dict[StepCode, dict[str, Compiled]] = {}

    def segments(self, code: StepCode) -> dict[str, Compiled]:
        """The segments of a code, by name."""
        if code not in self._of:
            self._of[code] = {name: self._runner(segment) for name, segment in code.segments.items()}
        return self._of[code]

    def prepare(self, steps: Sequence[tuple[StepCode, Sequence[Tensor]]], specs: Sequence[ChannelSpec]) -> None:
        """Compile the segments of steps, each given as its code and its values, in several processes at once.

        They fill Inductor's cache on disk, from which this process loads each segment when it first runs.
        """
        most = self._processes or precompile.most_processes(self._sharing)
        if not most:
            return
        jobs = {job: None for code, values in steps for job in precompile.jobs(code, values, specs)}
        new = [(segment, forms) for segment, forms in jobs if forms not in self._compiled.get(segment, {})]
        processes = self._processes or min(most, len(new) // precompile.SHARE)
        if processes < 2 or not new:
            return
        say(f"compile {len(new)} segments in {processes} processes")
        started = time.perf_counter()
        cached = precompile.compile_in_processes(new, processes, self._sharing)
        before = self.report or Report(self.rank, 0, 0.0, True)
        seconds = before.seconds + time.perf_counter() - started
        self.report = Report(self.rank, before.segments, seconds, before.cached and cached)

    def _runner(self, segment: Segment) -> Compiled:
        forms = self._compiled.setdefault(segment, {})

        def run(inputs: list[Tensor]) -> Sequence[Any]:
            form = tuple([Form.of(x) for x in inputs])
            if form not in forms:
                if len(forms) >= FORMS:
                    del forms[next(iter(forms))]
                forms[form] = self._compile(segment, inputs)
            return forms[form](inputs)

        return run

    def _compile(self, segment: Segment, inputs: list[Tensor]) -> Compiled:
        started, misses = time.perf_counter(), missed()
        before = self.report or Report(self.rank, 0, 0.0, True)
        say(f"compile segment {before.segments + 1}")
        with _compiling:
            compiled = compiled_segment(segment, inputs)
        cached = missed() == misses
        seconds = time.perf_counter() - started
        log.debug("compiled a segment of rank %d in %.1f s%s", self.rank, seconds, ", from the cache" * cached)
        self.report = Report(self.rank, before.segments + 1, before.seconds + seconds, before.cached and cached)
        return compiled


def compiled_segment(segment: Segment, inputs: Sequence[Tensor | Form]) -> Compiled:
    """Compile a segment for inputs of the forms of `inputs`."""
    function = segment.function()
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with torch.no_grad():
        fake = [_alone(x, mode) for x in inputs]
    indices: dict[tuple[Table, torch.device], int] = {}

    def noted(index: Table, device: torch.device) -> Tensor:
        indices.setdefault((index, device), len(indices))
        return torch.from_numpy(index.array.copy()).to(device)

    with mode, torch.no_grad(), index_tensors_from(noted):
        results = function(fake)
    places = _places(results)
    tables = [index_tensor(index, device) for index, device in indices]
    with torch.no_grad():
        fake_tables = [mode.from_tensor(table, static_shapes=True) for table in tables]

    def flat(*given: Tensor) -> list[Tensor]:
        traced = given[len(fake) :]
        with index_tensors_from(lambda index, device: traced[indices[index, device]]):
            return _flat(function(given[: len(fake)]))

    with mode, torch.no_grad():
        graph = make_fx(flat, tracing_mode="real")(*fake, *fake_tables)
    with torch.no_grad(), tracing(TracingContext(mode)):
        compiled: Any = compile_fx(graph, [*fake, *fake_tables])

    def run(inputs: list[Tensor]) -> list[Any]:
        given = [*inputs, *tables]
        inputs.clear()
        outputs = [*compiled(*given), None]
        del given
        return [[outputs[i] for i in place] if isinstance(place, list) else outputs[place] for place in places]

    return run


def _alone(x: Tensor | Form, mode: FakeTensorMode) -> Tensor:
    """A fake tensor of the same form that shares no memory with others: receive buffers may lie in one allocation, and
    a compiler that saw it would take a write to one for a write to all."""
    offset = 0
    if isinstance(x, Tensor):
        if type(x) not in (Tensor, nn.Parameter) or x.is_conj() or x.is_neg():
            return mode.from_tensor(x, static_shapes=True)
        offset = x.data_ptr() % ALIGNED // x.element_size()
        x = Form.of(x)
    with mode:
        if not offset:
            return x.empty()
        size = offset + 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride, strict=True) if n > 1)
        return torch.empty(size, dtype=x.dtype, device=x.device).as_strided(x.shape, x.stride, offset)


def missed() -> int:
    """How often this process has compiled what Inductor's cache did not have."""
    return counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_bypass"]


def _flat(results: Sequence[Any]) -> list[Tensor]:
    items = [item for result in results for item in (result if isinstance(result, list | tuple) else [result])]
    return [item for item in items if item is not None]


def _places(results: Sequence[Any]) -> list[int | list[int]]:
    """For each result the number of the output, or of a list those of its items; -1 for None."""
    count = 0

    def place(item: Any) -> int:
        nonlocal count
        if item is None:
            return -1
        count += 1
        return count - 1

    return [[place(item) for item in each] if isinstance(each, list | tuple) else place(each) for each in results]
