"""compile=True: one rank's program through torch.compile's backend, with its launches and waits in place.

The program is run once on fake tensors, as its interpreter would run it; what it does becomes an ATen graph, in which a
launch and a wait are two operators that Inductor does not look into::

    token    = fxpass::launch(values, token, program, site)
    token, … = fxpass::wait(values, token, program, site)

The token ties them into the order of the schedule, on every rank the same. Nothing in flight is known to Inductor: when
a launch returns it has copied its payload into the lane's own memory (or enqueued that copy on the current stream), and
the values are operands of the wait again, so that their memory is not given to others in between. State stays in the
session, as in eager mode. Index tables are inputs, so that ranks that differ by them alone share compiled code.
"""

from __future__ import annotations

import hashlib
import logging
import time
import weakref
from collections.abc import Sequence
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

#: Inductor keeps the order of the schedule: it neither sorts for memory or locality, nor moves operators by patterns
ORDER = {"reorder_for_locality": False, "reorder_for_peak_memory": False, "pattern_matcher": False}

_library = torch.library.Library("fxpass", "FRAGMENT")
_library.define("launch(Tensor[] values, Tensor token, str program, int site) -> Tensor")
_library.define("wait(Tensor[] values, Tensor token, str program, int site) -> Tensor[]")
_compiled: weakref.WeakValueDictionary[str, Compiled] = weakref.WeakValueDictionary()


@dataclass(eq=False)
class Compiled:
    """One rank's program, compiled for steps of one form.

    Args:
        displaced: for displaced steps (only where these have other shapes).
        values: one per placeholder; only their shapes count.
    """

    code: RankProgram
    displaced: bool
    values: Sequence[Tensor]
    transport: Transport | None = field(default=None, init=False)
    report: Report = field(init=False)

    def __post_init__(self) -> None:
        self.sites = self.code.sites
        digest = hashlib.sha256(self.code.source.encode())
        for site in self.sites:
            digest.update(repr(site.exchanges).encode())
        self.key = f"{digest.hexdigest()[:24]} rank {self.code.rank} {'displaced' if self.displaced else 'exact'}"
        _compiled[self.key] = self
        started = time.perf_counter()
        hits = counters["inductor"]["fxgraph_cache_hit"]
        self._tables, self._function = self._lowered(self.values)
        self.values = ()
        cached = counters["inductor"]["fxgraph_cache_hit"] > hits
        self.report = Report(self.code.rank, self.displaced, time.perf_counter() - started, cached)
        log.info("compiled %s in %.1f s%s", self.key, self.report.seconds, ", from the cache" if cached else "")

    def run(self, values: Sequence[Tensor], transport: Transport) -> list[Tensor]:
        """The flat outputs. `transport` performs the launches and waits."""
        _compiled[self.key] = self  # another module may hold an equal program
        self.transport = transport
        try:
            return list(self._function(*values, *self._tables))[:-1]
        finally:
            self.transport = None

    def _lowered(self, values: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        mode = FakeTensorMode(shape_env=ShapeEnv())
        fake = [mode.from_tensor(value, static_shapes=True) for value in values]
        indices: dict[tuple[Rows | Index, torch.device], int] = {}

        def noted(index: Rows | Index, device: torch.device) -> Tensor:
            indices.setdefault((index, device), len(indices))
            return torch.empty(len(index), dtype=torch.int64, device=device)

        with mode, torch.no_grad(), index_tensors_from(noted):
            self._traced(fake)
        tables = [index_tensor(index, device) for index, device in indices]
        fake_tables = [mode.from_tensor(table, static_shapes=True) for table in tables]

        def function(*inputs: Tensor) -> list[Tensor]:
            given = inputs[len(fake) :]
            with index_tensors_from(lambda index, device: given[indices[index, device]]):
                return self._traced(inputs[: len(fake)])

        with mode, torch.no_grad():
            graph = make_fx(function, tracing_mode="real")(*fake, *fake_tables)
        with torch.no_grad(), config.patch(ORDER), tracing(TracingContext(mode)):
            compiled: Any = compile_fx(graph, [*fake, *fake_tables])
        return tables, compiled

    def _traced(self, values: Sequence[Tensor]) -> list[Tensor]:
        emitter = _Emitter(self.key)
        return [*drive(self.code.run(values), emitter), emitter.token]


class _Emitter:
    """A transport that writes launches and waits into the graph being traced."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.token = torch.empty(0)

    def launch(self, site: Site, values: list[Tensor]) -> None:
        self.token = torch.ops.fxpass.launch(values, self.token, self.key, site.index)

    def wait(self, site: Site, values: list[Tensor]) -> list[Tensor]:
        self.token, *results = torch.ops.fxpass.wait(values, self.token, self.key, site.index)
        return results


def _launch(values: list[Tensor], token: Tensor, program: str, site: int) -> Tensor:
    compiled = _compiled[program]
    assert compiled.transport is not None, "a compiled program was called outside an executor"
    compiled.transport.launch(compiled.sites[site], values)
    return torch.empty(0)


def _wait(values: list[Tensor], token: Tensor, program: str, site: int) -> list[Tensor]:
    compiled = _compiled[program]
    assert compiled.transport is not None, "a compiled program was called outside an executor"
    results = compiled.transport.wait(compiled.sites[site], list(values))
    own = {
        value.untyped_storage().data_ptr() for value in values
    }  # an operator's result shares no memory with operands
    fresh = (r.clone() if r.untyped_storage().data_ptr() in own else r for r in results)
    return [torch.empty(0), *(result.contiguous() for result in fresh)]


def _wait_on_fakes(values: list[Tensor], token: Tensor, program: str, site: int) -> list[Tensor]:
    compiled = _compiled[program]
    exchanges = compiled.sites[site].steady.exchanges if compiled.displaced else compiled.sites[site].exchanges
    rank = compiled.code.rank
    results = [x.new_empty(e.result_shape(rank, x.shape)) for e, x in zip(exchanges, values, strict=True)]
    return [torch.empty(0), *results]


_library.impl("launch", _launch, "CompositeExplicitAutograd")
_library.impl("wait", _wait, "CompositeExplicitAutograd")
torch.library.register_fake("fxpass::launch", lambda values, token, program, site: torch.empty(0), lib=_library)
torch.library.register_fake("fxpass::wait", _wait_on_fakes, lib=_library)
