"""Plans for groups of ranks: figures and files have what each rank of the mesh receives."""

from __future__ import annotations

import json
from functools import lru_cache

import numpy as np
import pytest
import torch

import fxpass
from fxpass.capture.structure import WeightTable
from fxpass.inspect.store import to_json
from fxpass.inspect.text import text
from fxpass.ir.step import Step
from fxpass.passes.lower_comm import StepPrograms
from fxpass.predict.events import Message
from fxpass.runtime.lockstep import LockstepExecutor
from tests.inspect.onnx_ranks import Ranks, models_of
from tests.runtime.plans import block, inputs, steps

RANKS = range(4)


@lru_cache
def planned(cfg: int = 2, strategy: str = "displaced") -> fxpass.Plan:
    return fxpass.plan(block(), *inputs(), world_size=4, cfg=cfg, strategy=strategy)


@lru_cache
def one_group() -> fxpass.Plan:
    """The plan of two ranks for one of the two samples."""
    sample, timestep = inputs()
    return fxpass.plan(block(), sample[:1], timestep, world_size=2, strategy="displaced")


@pytest.mark.parametrize("exact", [True, False])
def test_a_rank_receives_what_it_would_in_its_group_alone_and_the_outputs_of_the_other_groups(exact: bool) -> None:
    output = inputs()[0].nbytes // 2
    for rank in RANKS:
        alone = one_group().bytes_received(rank % 2, exact=exact)
        assert planned().bytes_received(rank, exact=exact) == alone | {"output": alone["output"] + output}
        assert planned().state_bytes_per_rank[rank] == one_group().state_bytes_per_rank[rank % 2]
        assert planned().flops_per_rank[rank] == one_group().flops_per_rank[rank % 2]
        assert planned().padding_received(rank, exact=exact) == one_group().padding_received(rank % 2, exact=exact)
    assert planned().bound == 4


def test_the_dump_of_each_rank_has_the_samples_that_it_takes_and_the_bytes_that_it_receives() -> None:
    for rank in RANKS:
        shown = planned().snapshot(rank)
        data = json.loads(to_json(shown))
        received = sum(each["exact"][rank] for each in data["exchanges"])
        assert received == sum(planned().bytes_received(rank).values()) == shown.received()
        (take,) = [each for each in shown.nodes if each.operator == "take" and each.operands == ("x_sample",)]
        assert f"{rank // 2}:{rank // 2 + 1}" in take.arguments
        assert "gather(B: 1 -> 2 of all groups)" in text(shown)


def test_a_prediction_of_a_mesh_takes_as_long_as_one_of_its_groups_and_the_last_gather() -> None:
    both, alone, patches = (plan.predict("H100", "nvlink4") for plan in (planned(), one_group(), planned(cfg=1)))
    for mode in ("exact", "steady"):
        group, mesh = getattr(alone, mode), getattr(both, mode)
        assert group.compute < mesh.compute < 1.1 * group.compute
        assert group.exposed < mesh.exposed < getattr(patches, mode).exposed + group.exposed
    assert both.memory.state == alone.memory.state
    assert both.world == 4


def test_the_messages_of_a_group_do_not_reach_another_one() -> None:
    specs = StepPrograms(planned().graph, 0).channels
    halo, output = Message("x1", specs[1], True), Message("x5", specs[-1], False)
    assert [spec.exchanges[0].role for spec in (specs[1], specs[-1])] == ["halo", "output"]
    groups = np.kron(np.eye(2), np.ones((2, 2)))
    assert not (halo.bytes * (1 - groups)).any()
    assert halo.bytes.any()
    assert (output.partners == np.kron(np.ones((2, 2)), np.eye(2))).all()
    assert (output.received == inputs()[0].nbytes // 2).all()


def test_the_onnx_models_of_a_mesh_compute_what_lockstep_does() -> None:
    model, plan = block(), planned()
    ranks = Ranks(plan, model, models_of(plan, ("exact", "first unpaced")))
    weights = WeightTable(model, list(plan.program.weights.values())).tensors()
    loaded = LockstepExecutor(4).load(plan, weights, inputs())
    for call, exact in zip(steps(2), (True, False), strict=True):
        step = Step(0, exact, 0.0)
        with torch.no_grad():
            results = loaded.run_all(weights, call, step)
        for (found,), (expected,) in zip(ranks.run(call, step), results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
