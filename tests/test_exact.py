"""The promise of exact mode: every small model, split over 1 to 8 ranks, gives the unsplit model's outputs.

Constant-initialised parameters are random (`models.small`), and the inputs are others than those captured with.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxpass.capture import Call, capture
from fxpass.capture.structure import WeightTable
from fxpass.ir.exchange import Exchange
from fxpass.ir.program import Program, exchanges_of
from fxpass.ir.strategy import Strategy
from fxpass.make_plan import make_plan
from fxpass.models.small import Case, case, cases, output_tensors
from fxpass.plan import Plan
from fxpass.runtime.lockstep import LockstepExecutor, Tamper

EXACT = 1e-5
LARGE = ("unet_3d", "unet_motion", "unet_sdxl", "unet_sd_controlled")  #: seconds for each size
OVERHEAD = ("realign", "small", "rebalance")


@lru_cache(maxsize=1)
def captured(
    name: str, rows: int, cols: int, batch: int, gain: float = 1.0
) -> tuple[nn.Module, Program, Call, list[Tensor]]:
    """A model, its program, a call with fresh inputs and the unsplit model's answer to it.

    `gain` multiplies the weights of linear layers. Torch's initial values have a gain of 1 / sqrt(3), with which
    attention hardly looks, and what it finds has shrunk to a hundredth when it joins the residual stream.
    """
    module = case(name).build()
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(gain)
    sizes: dict[str, Any] = {"rows": rows, "batch": batch, "cols": cols, "module": module}
    program = capture(module, **case(name).inputs(seed=1, **sizes))
    fresh = case(name).inputs(seed=7, **sizes)
    with torch.no_grad():
        expected = output_tensors(module(**fresh))
    return module, program, Call.of(module, (), fresh), expected


def outputs(plan: Plan, module: nn.Module, call: Call, tamper: Tamper | None = None) -> list[list[Tensor]]:
    """What each rank returns."""
    weights = WeightTable(module, list(plan.program.weights.values())).tensors()
    executor = LockstepExecutor(plan.world_size, tamper=tamper, check=True)
    with torch.no_grad():
        return executor.load(plan, weights, call.tensors).run_all(weights, call.tensors)


def error(found: Tensor, expected: Tensor) -> float:
    """max abs difference / max abs."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def _sizes(each: Case, rows: int) -> tuple[int, int]:
    rows = rows - rows % each.multiple
    return rows, rows if each.square else 24


def _cases(*rows_batch_worlds: tuple[int, int, int]) -> list[Any]:
    """All models with all sizes. Slow tests: 1 and 4 ranks; of large models, other sizes than the first."""
    return [
        pytest.param(
            each.name, *_sizes(each, rows), batch, world,
            id=f"{each.name}-{rows}rows-batch{batch}-{world}ranks",
            marks=pytest.mark.slow if world in (1, 4) or (each.name in LARGE and i) else (),
        )
        for each in cases
        for i, (rows, batch, world) in enumerate(rows_batch_worlds)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "rows", "cols", "batch", "world"),
    _cases((50, 1, 3), (50, 1, 4), (64, 2, 1), (64, 2, 2), (64, 2, 8)),
)
def test_split_model_equals_the_unsplit_one(name: str, rows: int, cols: int, batch: int, world: int) -> None:
    module, program, call, expected = captured(name, rows, cols, batch)
    plan = make_plan(program, world, Strategy.of("sync"))
    for rank, found in enumerate(outputs(plan, module, call)):
        assert len(found) == len(expected)
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert a.shape == b.shape
            assert error(a, b) <= EXACT, f"output {i} of rank {rank}"
    assert not plan.fallbacks, str(plan)
    if world > 1:
        total = sum(plan.bytes_by_role.values())
        assert sum(plan.bytes_by_role.get(role, 0) for role in OVERHEAD) < 0.03 * total, plan.bytes_by_role
        assert plan.bound >= 0.8 * world, str(plan)


def _corrupt_each(name: str, most: int | None) -> None:
    """Put random payloads of the same scale in the place of one exchange's, for `most` exchanges, evenly picked."""
    module, program, call, expected = captured(name, *_sizes(case(name), 16), 1, 3**0.5)
    plan = make_plan(program, 2, Strategy.of("sync"))
    declared = [one for _, some in exchanges_of(plan.graph) for one in some if one.role != "output"]
    assert declared
    for exchange in declared[:: max(1, len(declared) // most)] if most else declared:

        def corrupt(
            node: str, at: Exchange, src: int, dst: int, payload: Tensor, exchange: Exchange = exchange
        ) -> Tensor:
            return _noise_like(payload) if at is exchange else payload

        found = outputs(plan, module, call, corrupt)
        off = [error(a, b) for rank in found for a, b in zip(rank, expected, strict=True)]
        # not a number is a change, too: a random sum of squares may be negative
        assert any(not e <= 1e-3 for e in off), f"{exchange} ({declared.index(exchange)} of {len(declared)}): {off}"


@pytest.mark.parametrize("name", [each.name for each in cases])
def test_a_corrupted_exchange_changes_the_output(name: str) -> None:
    _corrupt_each(name, most=2 if name in LARGE else 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", [each.name for each in cases])
def test_every_corrupted_exchange_changes_the_output(name: str) -> None:
    _corrupt_each(name, most=None)


def _noise_like(payload: Tensor) -> Tensor:
    if not payload.is_floating_point():
        return payload.roll(1)
    return torch.randn_like(payload) * payload.std() + payload.mean()


def test_more_ranks_than_rows_are_refused_with_the_number_that_would_do() -> None:
    _, program, _, _ = captured("unet_sd", 16, 16, 1)
    with pytest.raises(ValueError, match=r"cannot be shared among 40 ranks.*at most 16 ranks would do"):
        make_plan(program, 40, Strategy.of("sync"))
    assert make_plan(program, 16, Strategy.of("sync")).bound > 1.2
