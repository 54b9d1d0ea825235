"""Threads that compile and run at the same time do not see each other's state."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event
from typing import Any

import torch
from torch import Tensor

from fxpass.capture import capture
from fxpass.ir.layout import Rows
from fxpass.ir.ops import index_tensor, index_tensors_from
from fxpass.ir.program import specialize
from fxpass.runtime.executor import Bound
from fxpass.runtime.interpreter import RankProgram, Site
from fxpass.runtime.lower import Compiled
from tests.runtime.plans import block, cut_plan, inputs

CPU = torch.device("cpu")


class Meeting:
    """Performs the exchanges of one thread: notes them, and goes on only once the other thread is at the same place."""

    def __init__(self, rank: int, together: Barrier) -> None:
        self.rank = rank
        self.together = together
        self.acts: list[tuple[str, int]] = []

    def launch(self, site: Site, values: list[Any]) -> None:
        self.acts.append(("launch", site.index))
        self.together.wait(60)

    def wait(self, site: Site, values: list[Any]) -> list[Any]:
        self.acts.append(("wait", site.index))
        self.together.wait(60)
        return [x.new_ones(e.result_shape(self.rank, x.shape)) for e, x in zip(site.exchanges, values, strict=True)]


def test_equal_programs_in_two_threads_exchange_through_their_own_sessions() -> None:
    model = block()
    plan = cut_plan(capture(model, *inputs()), 2)
    weights = [model.get_parameter(name).detach() for name in plan.program.weights.values()]
    programs, given = [], []
    for _ in range(2):
        code = RankProgram.of(specialize(plan.graph, 1), 1)
        given.append(Bound.of(code, plan.program, CPU).values(weights, inputs()))
        with torch.no_grad():
            programs.append(Compiled(code, False, given[-1]))
    together = Barrier(2)
    sessions = [Meeting(1, together) for _ in programs]

    def run(i: int) -> list[Tensor]:
        with torch.no_grad():
            return programs[i].run(given[i], sessions[i])

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, range(2))
    exchanged = [(act, site.index) for site in programs[0].code.sites for act in ("launch", "wait")]
    assert all(sorted(session.acts) == sorted(exchanged) for session in sessions)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_thread_that_traces_leaves_the_index_tables_of_others_alone() -> None:
    tracing, looked = Event(), Event()

    def trace() -> Tensor:
        empty: Callable[..., Tensor] = lambda index, device: torch.full((len(index),), -1, device=device)  # noqa: E731
        with index_tensors_from(empty):
            tracing.set()
            assert looked.wait(60)
            return index_tensor(Rows.interval(2, 5), CPU)

    with ThreadPoolExecutor(1) as pool:
        traced = pool.submit(trace)
        assert tracing.wait(60)
        found = index_tensor(Rows.interval(2, 5), CPU)
        looked.set()
        assert traced.result().tolist() == [-1, -1, -1]
    assert found.tolist() == [2, 3, 4]
