"""compile=True: compile one rank's program with Inductor, with its launches and waits in place.

The program is traced once on fake tensors by its interpreter. In the ATen graph a launch and a wait are two operators
that are opaque to Inductor::

    token    = fxpass::launch(values, token, site)
    token, … = fxpass::wait(values, token, site)

The token fixes the order of the schedule, the same on every rank. Inductor knows nothing of messages in flight: when a
launch returns it has copied its payload into the lane's memory (or enqueued that copy on the current stream), and the
values are operands of the wait again, so that their memory is not reused in between. State stays in the session, as in
eager mode. Index tables are inputs, so that ranks that differ by them alone share compiled code. Which
program a `site` belongs to, and what performs its launches, is known to the thread that traces or runs the program.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._guards import TracingContext, tracing
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ..ir.layout import Rows
from ..ir.ops import Index, index_tensor, index_tensors_from
from .executor import Report
from .interpreter import RankProgram, Site, Transport, drive

log = logging.getLogger("fxpass")

#: keep the order of the schedule: no reordering for memory or locality, and no pattern matcher, which moves operators
KEEP_ORDER = {"reorder_for_locality": False, "reorder_for_peak_memory": False, "pattern_matcher": False}

_library = torch.library.Library("fxpass", "FRAGMENT")
_library.define("launch(Tensor[] values, Tensor token, int site) -> Tensor")
_library.define("wait(Tensor[] values, Tensor token, int site) -> Tensor[]")
#: the program that this thread traces or runs, and what performs its launches and waits (None while it is traced)
_current: ContextVar[tuple[Compiled, Transport | None]] = ContextVar("fxpass program")


@dataclass(eq=False)
class Compiled:
    """One rank's program, compiled for exact or for displaced steps.

    Args:
        displaced: compile for displaced steps, if these have other shapes.
        values: one per placeholder; only their shapes, strides, dtypes and devices matter.
    """

    code: RankProgram
    displaced: bool
    values: Sequence[Tensor]
    report: Report = field(init=False)

    def __post_init__(self) -> None:
        self.sites = self.code.sites
        started = time.perf_counter()
        hits = counters["inductor"]["fxgraph_cache_hit"]
        with self._as_current(None):
            self._tables, self._function = self._lower(self.values)
        self.values = ()
        cached = counters["inductor"]["fxgraph_cache_hit"] > hits
        self.report = Report(self.code.rank, self.displaced, time.perf_counter() - started, cached)
        form = "displaced steps" if self.displaced else "steps"
        log.info(
            "compiled rank %d for %s in %.1f s%s",
            *(self.code.rank, form, self.report.seconds, ", from the cache" if cached else ""),
        )

    def run(self, values: Sequence[Tensor], transport: Transport) -> list[Tensor]:
        """The flat outputs. `transport` performs the launches and waits."""
        with self._as_current(transport):
            return list(self._function(*values, *self._tables))[:-1]

    @contextmanager
    def _as_current(self, transport: Transport | None) -> Iterator[None]:
        token = _current.set((self, transport))
        try:
            yield
        finally:
            _current.reset(token)

    def _lower(self, values: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        mode = FakeTensorMode(shape_env=ShapeEnv())
        fake = [mode.from_tensor(value, static_shapes=True) for value in values]
        indices: dict[tuple[Rows | Index, torch.device], int] = {}

        def noted(index: Rows | Index, device: torch.device) -> Tensor:
            indices.setdefault((index, device), len(indices))
            return torch.empty(len(index), dtype=torch.int64, device=device)

        with mode, torch.no_grad(), index_tensors_from(noted):
            self._trace(fake)
        tables = [index_tensor(index, device) for index, device in indices]
        fake_tables = [mode.from_tensor(table, static_shapes=True) for table in tables]

        def function(*inputs: Tensor) -> list[Tensor]:
            given = inputs[len(fake) :]
            with index_tensors_from(lambda index, device: given[indices[index, device]]):
                return self._trace(inputs[: len(fake)])

        with mode, torch.no_grad():
            graph = make_fx(function, tracing_mode="real")(*fake, *fake_tables)
        with torch.no_grad(), config.patch(KEEP_ORDER), tracing(TracingContext(mode)):
            compiled: Any = compile_fx(graph, [*fake, *fake_tables])
        return tables, compiled

    def _trace(self, values: Sequence[Tensor]) -> list[Tensor]:
        emitter = _Emitter()
        return [*drive(self.code.run(values), emitter), emitter.token]


class _Emitter:
    """A transport that adds launches and waits to the graph being traced."""

    def __init__(self) -> None:
        self.token = torch.empty(0)

    def launch(self, site: Site, values: list[Tensor]) -> None:
        self.token = torch.ops.fxpass.launch(values, self.token, site.index)

    def wait(self, site: Site, values: list[Tensor]) -> list[Tensor]:
        self.token, *results = torch.ops.fxpass.wait(values, self.token, site.index)
        return results


def _running() -> tuple[Compiled, Transport]:
    compiled, transport = _current.get()
    assert transport is not None, "a launch or a wait was run while its program was traced"
    return compiled, transport


def _launch(values: list[Tensor], token: Tensor, site: int) -> Tensor:
    compiled, transport = _running()
    transport.launch(compiled.sites[site], values)
    return torch.empty(0)


def _wait(values: list[Tensor], token: Tensor, site: int) -> list[Tensor]:
    compiled, transport = _running()
    results = transport.wait(compiled.sites[site], list(values))
    # an operator's result shares no memory with operands
    operands = {value.untyped_storage().data_ptr() for value in values}
    fresh = (r.clone() if r.untyped_storage().data_ptr() in operands else r for r in results)
    return [torch.empty(0), *(result.contiguous() for result in fresh)]


def _wait_on_fakes(values: list[Tensor], token: Tensor, site: int) -> list[Tensor]:
    compiled, _ = _current.get()
    exchanges = compiled.sites[site].steady.exchanges if compiled.displaced else compiled.sites[site].exchanges
    rank = compiled.code.rank
    results = [x.new_empty(e.result_shape(rank, x.shape)) for e, x in zip(exchanges, values, strict=True)]
    return [torch.empty(0), *results]


_library.impl("launch", _launch, "CompositeExplicitAutograd")
_library.impl("wait", _wait, "CompositeExplicitAutograd")
torch.library.register_fake("fxpass::launch", lambda values, token, site: torch.empty(0), lib=_library)
torch.library.register_fake("fxpass::wait", _wait_on_fakes, lib=_library)
