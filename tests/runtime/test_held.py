"""Steps take rows that ranks have kept of earlier steps, and keep rows of their outputs: law 1 holds for both."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxpass.capture import capture
from fxpass.ir.layout import Layout, Rows, even
from fxpass.ir.program import layout_of
from fxpass.ir.step import EXACT
from fxpass.ir.verify import verify
from fxpass.passes.normalize import memory_of_their_own
from fxpass.runtime.held import Held, Holding
from fxpass.runtime.lockstep import LockstepExecutor
from tests.runtime.plans import cut_plan
from tests.runtime.tape import tape


class Frame(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        now = self.conv(x + self.conv(before)).relu()
        return now.sin(), now.cos()


UNEVEN = (Rows.interval(0, 3), Rows.interval(3, 13), Rows.interval(13, 16))
OVERLAPPING = (Rows.interval(0, 9), Rows.interval(4, 11), Rows.interval(8, 16))
LAYOUTS = {"as the cut": Layout(2, even(16, 3, 2)), "uneven": Layout(2, UNEVEN), "overlapping": Layout(2, OVERLAPPING)}
LAYOUTS |= {"along another dim": Layout(3, even(9, 3))}


@torch.no_grad()
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_takes_rows_however_ranks_hold_them_and_keeps_those_of_its_layout(name: str) -> None:
    torch.manual_seed(0)
    model, layout = Frame().eval(), LAYOUTS[name]
    x, before = torch.randn(2, 1, 4, 16, 9)
    program = capture(model, torch.randn_like(x), torch.randn_like(before))
    program = replace(program, given={program.inputs[1]: layout}, kept=(1,))
    plan = cut_plan(program, 3)
    verify(plan.graph, "scheduled", 3)
    executor = LockstepExecutor(3, check=True)
    loaded = executor.load(plan, [], [x, x.new_empty(0)])
    rows = [[before.index_select(layout.axis, index(layout, rank))] for rank in range(3)]
    executor.held.outputs(rows, Holding(keeps={0: 7}))
    weights = [model.get_parameter(name) for name in plan.program.weights.values()]
    results = loaded.run_all(weights, [x, x.new_empty(0)], EXACT, Holding({1: 7}, {1: 8}))
    first, second = model(x, before)
    kept = layout_of(plan.graph.find_nodes(op="output")[0].args[0][1])
    assert kept.split
    after = executor.held.inputs([x], Holding({0: 8}), 3)
    for rank, ((found, nothing), (rows_of_second,)) in enumerate(zip(results, after, strict=True)):
        torch.testing.assert_close(found, first)
        assert not nothing.numel()
        torch.testing.assert_close(rows_of_second, second.index_select(kept.axis, index(kept, rank)))


def index(layout: Layout, rank: int) -> Tensor:
    return torch.tensor(layout.rows[rank].array)


@torch.no_grad()
def test_steps_that_are_recorded_keep_rows_too() -> None:
    x = torch.randn(1, 4, 16, 8)
    program = replace(capture(nn.Tanh(), x), kept=(0,))
    executor = LockstepExecutor(2)
    loaded = executor.load(cut_plan(program, 2), [], [x])
    loaded.steps._record = tape
    for number in range(3):  # the first one runs as usual, the next is recorded, the last is replayed
        loaded.run([], [x + number], EXACT, Holding(keeps={0: number}))
        rows = [own for (own,) in executor.held.inputs([x], Holding({0: number}), 2)]
        torch.testing.assert_close(torch.cat(rows, 2), (x + number).tanh())
    assert loaded.steps._graphs[0].graphs


def test_what_is_kept_does_not_keep_the_memory_of_the_rest() -> None:
    held, whole = Held(), torch.zeros(100, 4)
    held.outputs([[whole[:2]]], Holding(keeps={0: 1}))
    ((part,),) = held.inputs([torch.empty(0)], Holding({0: 1}), 1)
    assert part.untyped_storage().nbytes() == part.nbytes
    held.forget([1, 2])
    assert not len(held)


def test_an_output_that_shares_memory_is_gathered() -> None:
    class Shared(Frame):
        def forward(self, x: Tensor, before: Tensor) -> Any:
            now = self.conv(x)
            return now, now[:, :2], now.clone(), before[:, :1], now.sin()

    program = capture(Shared().eval(), torch.randn(1, 4, 16, 8), torch.randn(1, 4, 16, 8))
    assert memory_of_their_own(program) == [2, 4]
