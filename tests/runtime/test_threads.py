"""Threads that compile and run at the same time do not see each other's state."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event

import torch
from torch import Tensor

from fxpass.capture import capture
from fxpass.ir.layout import Rows
from fxpass.ir.ops import index_tensor, index_tensors_from
from fxpass.ir.step import EXACT
from fxpass.runtime.lockstep import LockstepExecutor
from tests.runtime.plans import cut_plan

CPU = torch.device("cpu")


def test_equal_plans_that_two_threads_compile_and_run_at_once_do_not_meet() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.SiLU()).eval()
    samples = [torch.randn(1, 4, 16, 8) for _ in range(2)]
    plan = cut_plan(capture(model, samples[0]), 2)
    weights = [model.get_parameter(name).detach() for name in plan.program.weights.values()]
    loaded = [LockstepExecutor(2, compile=True).load(plan, weights, [sample]) for sample in samples]
    together = Barrier(2)

    def run(i: int) -> list[Tensor]:
        with torch.no_grad():
            found = []
            for _ in range(3):
                together.wait(60)
                found.append(loaded[i].run(weights, [samples[i]], EXACT)[0])
            return found

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run, range(2)))
    for found, sample in zip(results, samples, strict=True):
        for each in found:
            torch.testing.assert_close(each, model(sample).detach(), rtol=1e-5, atol=1e-5)


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
