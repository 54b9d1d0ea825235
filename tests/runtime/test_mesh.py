"""Groups of ranks run different samples of a batch: a mesh of guidance branches and patches, on all executors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpass
from fxpass.ir.advice import FxpassWarning
from fxpass.ir.mesh import Axis, Mesh
from tests.runtime.plans import Block, block, inputs, steps, whole
from tests.torchrun import torchrun


def lockstep(world: int, model: nn.Module | None = None, **named: Any) -> Any:
    return fxpass.parallelize(model or block(), world, executor="lockstep", **named)


def test_ranks_are_counted_by_group_and_each_axis_has_its_lines() -> None:
    mesh = Mesh(2, 3)
    assert mesh.world == 6
    assert mesh.along_patches == Axis("patches", ((0, 1, 2), (3, 4, 5)), 6)
    assert [mesh.along_patches.members(rank) for rank in (0, 2, 3)] == [(0, 1, 2), (0, 1, 2), (3, 4, 5)]
    assert [mesh.along_samples.members(rank) for rank in (0, 3, 4)] == [(0, 3), (0, 3), (1, 4)]
    assert [mesh.along_patches.place(rank) for rank in range(6)] == [0, 1, 2, 0, 1, 2]
    assert [mesh.along_samples.place(rank) for rank in range(6)] == [0, 0, 0, 1, 1, 1]


def test_two_guidance_branches_on_two_ranks_exchange_nothing_but_the_output() -> None:
    module = lockstep(2, cfg=2)
    out = module(*inputs())["sample"]
    torch.testing.assert_close(out, whole(block(), *inputs()))
    assert module.plan.mesh == Mesh(2, 1)
    assert set(module.plan.bytes_by_role) == {"output"}
    assert module.traffic == {"output": out.nbytes // 2}
    assert module.plan.bytes_received_per_rank == ({"output": out.nbytes // 2},) * 2
    assert module.plan.bytes_by_role == {"output": out.nbytes}


def test_guidance_and_patches_equal_patches_alone() -> None:
    both, patches = lockstep(4, cfg=2), lockstep(4)
    torch.testing.assert_close(both(*inputs())["sample"], patches(*inputs())["sample"], rtol=0, atol=1e-6)
    assert both.plan.mesh == Mesh(2, 2)
    assert both.traffic == both.plan.bytes_received_per_rank[0]
    assert sum(map(sum, (each.values() for each in both.plan.bytes_received_per_rank))) == sum(
        both.plan.bytes_by_role.values()
    )


@pytest.mark.parametrize("strategy", ["displaced", "compressed", "pcpp", "no_sync"])
def test_displaced_steps_of_a_group_are_those_of_a_patch_world_on_its_samples_alone(strategy: str) -> None:
    named: dict[str, Any] = {"strategy": strategy, "warmup_steps": 2}
    both = lockstep(4, cfg=2, **named)
    halves = [lockstep(2, **named) for _ in range(2)]
    for sample, timestep in steps(6):
        out = both(sample, timestep)["sample"]
        alone = [half(part, timestep)["sample"] for half, part in zip(halves, sample.split(1), strict=True)]
        assert torch.equal(out, torch.cat(alone))


def test_samples_of_several_prompts_and_branches_are_divided_in_the_order_of_the_batch() -> None:
    module = lockstep(4, cfg=2, data=2)
    sample = torch.randn(8, 4, 16, 8)
    out = module(sample, torch.tensor([0.3]))["sample"]
    assert module.plan.mesh == Mesh(4, 1)
    torch.testing.assert_close(out, whole(block(), sample, torch.tensor([0.3])))


class Mixing(Block):
    """Its result depends on the mean over the batch."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Any:
        return super().forward(sample - sample.mean(0), timestep)


def test_a_model_that_mixes_samples_runs_in_patches_on_all_ranks_and_a_warning_says_why() -> None:
    model = Mixing().eval()
    module = lockstep(2, model, cfg=2)
    with pytest.warns(FxpassWarning, match=r"(?s)not divided among 2 groups.*all 2 ranks.*mean.* mixes the samples"):
        out = module(*inputs())["sample"]
    assert module.plan.mesh == Mesh(1, 2)
    torch.testing.assert_close(out, whole(model, *inputs()))


def test_a_call_with_one_sample_runs_in_patches_and_the_next_one_with_two_is_divided() -> None:
    module = lockstep(2, data=2)
    sample, timestep = inputs()
    with pytest.warns(FxpassWarning, match=r"`sample` has 1 sample, which 2 groups cannot share equally"):
        one = module(sample[:1], timestep)["sample"]
    torch.testing.assert_close(one, whole(block(), sample[:1], timestep))
    assert module.plan.mesh == Mesh(1, 2)
    module(sample, timestep)
    assert module.plan.mesh == Mesh(2, 1)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """What each of four ranks saw through shared memory, and through gloo."""
    return torchrun("tests.runtime.mesh_ranks", folder=tmp_path_factory.mktemp("ranks"), world=4)


@pytest.mark.parametrize("kind", ["MemoryChannel", "GroupChannel"])
def test_ranks_under_torchrun_give_what_lockstep_gives_bit_for_bit(kind: str, seen: list[list[dict[str, Any]]]) -> None:
    for memory, gloo in seen:
        found = memory if kind == "MemoryChannel" else gloo
        assert found["equal"] == [True] * (6 + 2 * 6)
        assert found["kinds"] == [kind]
        assert found["lines"] == ([2] if kind == "GroupChannel" else [0])  # ranks of a group
        assert set(found["traffic"]) > {"halo", "keys_values", "moments", "output"}
        early, after = found["errors"]  # rank 0 alone has used the first result before the second call
        assert "DisagreementError" in early
        assert (
            "runs 2 of the calls that run at once, rank 0 1: on some ranks only was the result of a call used" in early
        )
        assert after == "nothing"


def test_spawned_workers_give_what_lockstep_gives_bit_for_bit() -> None:
    named: dict[str, Any] = {"cfg": 2, "strategy": "displaced", "warmup_steps": 2}
    expected = lockstep(4, **named)
    model: Any = block()
    with fxpass.parallelize(model, 4, executor="spawn", timeout=120, **named) as module:
        for call in steps(5):
            assert torch.equal(module(*call)["sample"], expected(*call)["sample"])
        for sample, timestep in steps(5, seed=1):  # one call for each sample
            found, wanted = ([each(x, timestep)["sample"] for x in sample.split(1)] for each in (module, expected))
            assert all(torch.equal(a + 0, b + 0) for a, b in zip(found, wanted, strict=True))


def test_a_saved_plan_has_its_groups(tmp_path: Path) -> None:
    path = tmp_path / "plans.json"
    for cfg in (1, 2):
        fxpass.plan(block(), *inputs(), world_size=4, cfg=cfg).save(path)
    with pytest.raises(
        ValueError, match=r"several kinds of plans; say which by world_size, strategy, cfg, stages and patches"
    ):
        lockstep(4, plan=path)
    module = lockstep(4, plan=path, cfg=2)
    torch.testing.assert_close(module(*inputs())["sample"], whole(block(), *inputs()))
    assert module.plan.mesh == Mesh(2, 2)
    assert module.plan.fingerprint == fxpass.plan(block(), *inputs(), world_size=4, cfg=2).fingerprint


def test_plans_of_different_meshes_have_different_fingerprints() -> None:
    plans = [fxpass.plan(block(), *inputs(), world_size=4, cfg=cfg) for cfg in (1, 2)]
    assert plans[0].fingerprint != plans[1].fingerprint
    assert "4 ranks (2 groups of 2 patches)" in str(plans[1])


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"cfg": 0}, "cfg must be a whole number of at least 1, not 0"),
        ({"cfg": True}, "cfg must be a whole number of at least 1, not True"),
        ({"cfg": 2.0}, "cfg must be a whole number of at least 1, not 2.0"),
        ({"data": "2"}, "data must be a whole number of at least 1, not '2'"),
        ({"data": -1}, "data must be a whole number of at least 1, not -1"),
        ({"cfg": 3}, "4 ranks cannot be divided into cfg x data = 3 x 1 groups of equal size"),
        ({"cfg": 2, "data": 4}, "world_size must be a multiple of 8"),
    ],
)
def test_a_number_of_groups_that_makes_no_sense_is_refused_at_once(named: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        lockstep(4, **named)
    with pytest.raises(ValueError, match=re.escape(words)):
        fxpass.plan(block(), *inputs(), world_size=4, **named)


SLOW = """
[devices.slow]
description = "a slow one"
link = "slow"
matrix = { float32 = 6e10 }
bandwidth = 8e9
[devices.slow.sources]
matrix = "made up"
bandwidth = "made up"

[links.slow]
description = "a slow one"
medium = "ports"
latency = 1.0
bandwidth = 1e9
[links.slow.sources]
latency = "made up"
bandwidth = "made up"
"""  #: a target whose messages take a second


@pytest.mark.parametrize("executor", ["lockstep", "spawn"])
def test_ranks_that_are_left_over_do_the_same_once_more(executor: str, tmp_path: Path) -> None:
    link = tmp_path / "slow.toml"
    link.write_text(SLOW)
    named: dict[str, Any] = {"strategy": "auto", "target": str(link), "executor": executor}
    module: Any = fxpass.parallelize(block(), 2, **named)
    sample, timestep = (each[:1] for each in inputs())
    try:
        with pytest.warns(FxpassWarning, match="2 ranks over slow would be slower than 1"):  # one message is sent
            torch.testing.assert_close(module(sample, timestep)["sample"], whole(block(), sample, timestep))
        assert (module.plan.mesh, module.plan.copies) == (Mesh(2, 1), 2)
        module.plan.save(tmp_path / "plans.json")
    finally:
        module.close()
    again: Any = fxpass.parallelize(block(), plan=tmp_path / "plans.json", executor="lockstep")
    torch.testing.assert_close(again(sample, timestep)["sample"], whole(block(), sample, timestep))
    assert (again.plan.mesh, again.plan.copies) == (Mesh(2, 1), 2)
