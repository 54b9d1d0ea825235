"""What displaced steps promise of every model of the exact suite: stale, never wrong for long, alike on all ranks.

All models of the zoo have exchanges that are stale and depend on the sample, under every preset here; that is asserted
and not assumed. The autoencoders have no timestep, so nobody can tell their steps apart: `fxpass.parallelize` runs all
of them exactly, which the last test shows. The displaced steps of their plans are run all the same, by hand.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fxpass
from fxpass.capture import Call
from fxpass.capture.structure import WeightTable
from fxpass.ir.exchange import Exchange
from fxpass.ir.inputs import moving
from fxpass.ir.program import exchanges_of
from fxpass.ir.step import EXACT as EXACT_STEP
from fxpass.ir.step import Step
from fxpass.ir.strategy import Strategy
from fxpass.make_plan import make_plan
from fxpass.models.small import case, cases, output_tensors
from fxpass.plan import Plan
from fxpass.runtime.calls.clock import Clock
from fxpass.runtime.calls.generation import Generations
from fxpass.runtime.lockstep import LockstepExecutor
from tests.test_exact import EXACT, captured, error

PRESETS = ("displaced", "compressed", "corrected_async_gn", "stale_gn", "sync_gn")
NO_TIMESTEP = ("vae_decode", "vae_encode")
MORE_RANKS = (("unet_sd", 3), ("unet_2d_resnet", 4), ("controlnet", 4), ("flux", 3), ("sana", 4), ("cogvideox_5b", 4))
FAST = [(name, preset, 2) for name in ("controlnet", "sd35", "sana", "wan") for preset in ("displaced", "compressed")]
GAIN = 3**0.5  #: see `captured`: attention looks, so that stale keys and values show


def _sweep() -> list[Any]:
    pairs = [(each.name, 2) for each in cases] + list(MORE_RANKS)
    slow = pytest.mark.slow
    return [
        pytest.param(*one, marks=[] if one in FAST else slow, id=f"{one[0]}-{one[1]}-{one[2]}ranks")
        for one in ((name, preset, ranks) for name, ranks in pairs for preset in PRESETS)
    ]


def _given(name: str, module: Any, k: int) -> dict[str, Any]:
    """Inputs of step k: the sample drifts and the timestep falls."""
    given = case(name).inputs(rows=32, batch=2, seed=7, module=module)
    (sample,) = (key for key in given if key in ("sample", "hidden_states", "latent"))
    drift = torch.randn(given[sample].shape, generator=torch.Generator().manual_seed(8))
    given[sample] = given[sample] + 0.1 * k * drift
    if name not in NO_TIMESTEP:
        given["timestep"] = (given["timestep"] * (1 - 0.1 * k)).to(given["timestep"].dtype)
    return given


def _stale_by_the_sample(plan: Plan) -> list[Exchange]:
    """What displaced steps take from earlier ones though it depends on the sample."""
    found = moving(plan.program)
    sample = plan.program.inputs[found.sample if found else 0]
    reached: set[Any] = set()
    for node in plan.graph.nodes:
        if node.name == sample or any(source in reached for source in node.all_input_nodes):
            reached.add(node)
    some = (e for node, message in exchanges_of(plan.graph) if node in reached for e in message)
    return [e for e in some if e.fresh not in ("sync", "frozen")]


def _agree(ranks: list[list[Tensor]]) -> bool:
    return all(torch.equal(a, b) for others in ranks[1:] for a, b in zip(others, ranks[0], strict=True))


@pytest.mark.parametrize(("name", "preset", "ranks"), _sweep())
def test_displaced_steps_equal_the_unsplit_model_at_rest_and_follow_it_in_motion(
    name: str, preset: str, ranks: int
) -> None:
    """Steps are given by hand while the input rests: a clock takes a timestep's third coming for a new generation."""
    module, program, _, _ = captured(name, 32, 16, 2, GAIN)
    plan = make_plan(program, ranks, Strategy.of(preset))
    assert (moving(plan.program) is None) == (name in NO_TIMESTEP)
    assert _stale_by_the_sample(plan), "nothing of this plan can be stale: say so above, and expect exact steps"
    given = [_given(name, module, k) for k in range(4)]
    calls = [Call.of(module, (), each).tensors for each in given]
    weights = WeightTable(module, list(plan.program.weights.values())).tensors()
    loaded = LockstepExecutor(ranks, check=True).load(plan, weights, calls[0])
    clock, generation = Clock.of(plan.program, warmup_steps=1), Generations().current()
    with torch.no_grad():
        expected = [output_tensors(module(**each)) for each in given]
        assert clock.step(calls[0], generation).exact
        for step in (EXACT_STEP, *(Step(exact=False, pace=1.0),) * 3):
            for rank, found in enumerate(loaded.run_all(weights, calls[0], step)):
                for a, b in zip(found, expected[0], strict=True):
                    assert error(a, b) <= EXACT, f"{step}, rank {rank}"
        for k in (1, 2, 3):
            step = clock.step(calls[k], generation)
            assert step.exact == (name in NO_TIMESTEP)
            outputs = loaded.run_all(weights, calls[k], replace(step, exact=False))
            assert _agree(outputs), f"ranks return unlike outputs at step {k}"
            if k > 1:
                continue  # what was forecast from one change may overshoot at the next: there is no law
            wanted, found = expected[k], outputs[0]
            assert any(error(a, b) > EXACT for a, b in zip(found, wanted, strict=True)), "nothing was stale"
            for a, b, old in zip(found, wanted, expected[0], strict=True):
                assert (a - b).norm() < (old - b).norm(), f"{error(a, b)} off, the old output is {error(old, b)} off"


@pytest.mark.parametrize("name", NO_TIMESTEP)
def test_a_model_without_a_timestep_is_exact_at_every_step(name: str) -> None:
    model: Any = case(name).build()
    given = [_given(name, model, k) for k in range(3)]
    with fxpass.parallelize(model, 2, strategy="displaced", warmup_steps=1, executor="lockstep") as module:
        with pytest.warns(UserWarning, match="no input that is known to be a timestep"):
            found = [module(**given[0])]
        found += [module(**each) for each in given[1:]]
    for each, output in zip(given, found, strict=True):
        with torch.no_grad():
            wanted = output_tensors(model(**each))
        for a, b in zip(output_tensors(output), wanted, strict=True):
            assert error(a, b) <= EXACT
