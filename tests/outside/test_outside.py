"""Models that no library wrote, through the public interface: exact on every number of ranks, whatever their style."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fxpass
from fxpass.capture import Call
from fxpass.capture.objects import flatten
from fxpass.ir.inputs import moving
from tests.outside.cases import Outsider, outsiders
from tests.test_exact import EXACT, error

RANKS = (2, 3, 4)
SLOW = pytest.mark.slow


def _runs() -> list[Any]:
    """In CI: even rows on two ranks, odd ones on three."""
    runs = [(each, rows, ranks) for each in outsiders for rows in (each.rows, each.odd) for ranks in RANKS]
    return [
        pytest.param(
            each, rows, ranks, id=f"{each.name}-{rows}rows-{ranks}ranks",
            marks=[] if (rows, ranks) == (each.odd, 3) else SLOW,
        )
        for each, rows, ranks in runs
    ]  # fmt: skip


def _compared(found: Any, expected: Any) -> float:
    """The largest error of any tensor; the form and all else are equal."""
    (leaves, form), (wanted, wanted_form) = flatten(found), flatten(expected)
    assert form == wanted_form
    worst = 0.0
    for a, b in zip(leaves, wanted, strict=True):
        if isinstance(b, Tensor):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert b.std() > 0.01, "an output that hardly differs from a constant shows nothing"
            worst = max(worst, error(a, b))
        else:
            assert a == b
    return worst


@pytest.mark.parametrize(("each", "rows", "ranks"), _runs())
@torch.no_grad()
def test_a_model_of_ones_own_is_exact_on_inputs_it_was_not_captured_with(each: Outsider, rows: int, ranks: int) -> None:
    model: Any = each.build(rows)
    first, fresh = (each.arguments(rows, seed=seed) for seed in (1, 2))
    parallel: Any = fxpass.parallelize(model, ranks, executor="lockstep")
    for args, kwargs in (first, fresh):
        assert _compared(parallel(*args, **kwargs), model(*args, **kwargs)) <= EXACT
    assert parallel.plan.bound > 0.6 * ranks, str(parallel.plan)
    assert not parallel.plan.fallbacks, str(parallel.plan)


@pytest.mark.parametrize(
    ("each", "ranks"),
    [
        pytest.param(each, ranks, id=f"{each.name}-{ranks}ranks", marks=[] if ranks == 2 else SLOW)
        for each in outsiders
        for ranks in RANKS
    ],
)
@torch.no_grad()
def test_a_displaced_step_on_an_unchanged_input_equals_an_exact_one(each: Outsider, ranks: int) -> None:
    """And on a changed one it does not: the steps are displaced indeed."""
    model: Any = each.build(each.rows)
    args, kwargs = each.arguments(each.rows)
    parallel: Any = fxpass.parallelize(model, ranks, strategy="displaced", warmup_steps=1, executor="lockstep")
    expected = model(*args, **kwargs)
    parallel.reset()  # a generation that is announced, so that a timestep may repeat in it
    for _ in range(2):
        assert _compared(parallel(*args, **kwargs), expected) <= EXACT
    found = moving(parallel.plan.program)
    assert found is not None
    call = Call.of(model, args, kwargs)
    tensors = list(call.tensors)
    tensors[found.sample] = tensors[found.sample] + 0.3 * torch.randn(tensors[found.sample].shape)
    tensors[found.timestep] = (tensors[found.timestep] * 0.9).to(tensors[found.timestep].dtype)
    kwargs = call.rebuild(call.with_numbers(tensors))
    assert _compared(call.run(parallel, kwargs), call.run(model, kwargs)) > EXACT
