"""Guidance in two calls, each fed by a call of a part of its own: both branches run at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fxpass
from fxpass.ir.advice import FxpassWarning
from fxpass.ir.mesh import Mesh
from fxpass.runtime.calls.deferred import DeferredTensor
from fxpass.runtime.lockstep import LockstepExecutor, LockstepPlan
from tests.runtime.calls.feeding import (
    HINT,
    PROMPT,
    check_workers,
    close,
    generation,
    joint_of,
    own_programs,
    pipeline,
    split,
)
from tests.runtime.calls.test_deferred import failing


class Branches:
    """A step of two guidance branches, one call of each part for each of them.

    Attributes:
        scales: of the residuals of each branch.
        kept: the branches whose residuals the denoiser takes.
        between: called with the result of the first branch.
    """

    def __init__(
        self,
        pipe: Any,
        scales: Sequence[float] = (1.0, 1.0),
        kept: Sequence[int] = (0, 1),
        between: Callable[[Tensor], object] = lambda first: None,
    ) -> None:
        self.pipe, self.scales, self.kept, self.between = pipe, scales, kept, between
        pipe.step = self

    def call(self, branch: int, sample: Tensor, timestep: Tensor) -> Tensor:
        here, pipe = slice(branch, branch + 1), self.pipe
        fed: dict[str, Any] = {}
        if branch in self.kept:
            residuals, middle = pipe.controlnet(sample[here], timestep, hint=HINT[here])
            scale = self.scales[branch]
            fed = {"residuals": [scale * each for each in residuals], "middle": scale * middle}
        return pipe.unet(sample[here], timestep, PROMPT[here], **fed)

    def __call__(self, sample: Tensor, timestep: Tensor, scale: float = 1.0) -> Tensor:
        first = self.call(0, sample, timestep)
        self.between(first)
        second = self.call(1, sample, timestep)
        return first + 2 * (second - first)


def branches(**named: Any) -> Any:
    pipe = pipeline()
    Branches(pipe, **named)
    return pipe


@pytest.mark.parametrize("world", [2, 4])
def test_two_guidance_calls_with_a_part_each_run_at_once_on_a_mesh(world: int) -> None:
    pipe = branches(scales=(0.5, 2.0))
    expected = generation(pipe, 3)
    split(pipe, world, cfg=2)
    waited: list[bool] = []
    pipe.step.between = lambda first: waited.append(isinstance(first, DeferredTensor))
    close(generation(pipe, 3), expected)
    assert waited == [True] * 3
    assert own_programs(pipe) == (0, 0)
    plan: Any = fxpass.parallel(pipe.controlnet).plan
    assert plan is fxpass.parallel(pipe.unet).plan
    assert plan.mesh == Mesh(2, world // 2)
    assert plan.calls == 2
    if world == 2:
        assert joint_of(pipe).executor.traffic == {"output": 3 * expected[0][:1].nbytes}


@pytest.mark.parametrize("strategy", ["displaced", "compressed"])
def test_displaced_steps_of_a_branch_with_its_part_are_those_of_a_patch_world_of_its_own(strategy: str) -> None:
    named: dict[str, Any] = {"strategy": strategy, "warmup_steps": 2}
    pipe, alone = branches(), branches()
    exact = generation(branches())
    split(pipe, 4, cfg=2, **named)
    split(alone, 2, **named)
    found = generation(pipe)
    assert all(map(torch.equal, found, generation(alone)))
    assert fxpass.parallel(pipe.unet)._engine._generations.current().displaced == 4
    close(found[:2], exact[:2])
    for stale, right in zip(found[2:], exact[2:], strict=True):
        assert 1e-6 < (stale - right).norm() / right.norm() < 0.05
    assert all(map(torch.equal, generation(pipe), found))


def test_a_branch_without_the_part_is_right_and_later_calls_of_both_run_in_patches() -> None:
    pipe = branches(kept=(1,))
    expected = generation(pipe, 3)
    split(pipe, 2, cfg=2)
    with pytest.warns(FxpassWarning, match="calls that could run at once did not come one after the other"):
        close(generation(pipe, 3), expected)
    plans: list[Any] = [fxpass.parallel(pipe.unet)._engine.plan, joint_of(pipe).plan]
    assert [(plan.mesh.groups, plan.calls) for plan in plans] == [(1, 1), (1, 1)]


def test_a_first_branch_with_its_part_that_is_used_before_the_second_call_is_right() -> None:
    pipe = branches(between=lambda first: first.sum())
    expected = generation(pipe, 3)
    split(pipe, 2, cfg=2)
    with pytest.warns(FxpassWarning, match="so until this generation ends all 2 ranks work on patches of each call"):
        close(generation(pipe, 3), expected)


def first_branch(pipe: Any) -> Tensor:
    """The result of the first branch of a step."""
    with torch.no_grad():
        return pipe.step.call(0, torch.ones(2, 4, 16, 8), torch.tensor([0.5]))


@pytest.mark.parametrize("name", ["unet", "controlnet"])
def test_a_branch_with_its_part_that_waits_when_either_closes_is_computed(name: str) -> None:
    pipe = branches()
    expected = first_branch(pipe)
    split(pipe, 2, cfg=2)
    found = first_branch(pipe)
    assert isinstance(found, DeferredTensor)
    fxpass.parallel(getattr(pipe, name)).close()
    assert found.value is not None
    close([found], [expected])


@pytest.mark.parametrize("name", ["unet", "controlnet"])
def test_other_ranks_hear_of_a_branch_with_its_part_that_fails_when_either_closes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = split(branches(), 2, cfg=2)
    found = first_branch(pipe)
    told: list[BaseException] = []
    monkeypatch.setattr(LockstepPlan, "run", failing)
    monkeypatch.setattr(LockstepExecutor, "failed", lambda _, error: told.append(error))
    fxpass.parallel(getattr(pipe, name)).close()
    assert [type(error) for error in told] == [MemoryError]
    with pytest.raises(RuntimeError, match="was not computed: memory is full"):
        _ = found + 0


@pytest.mark.parametrize("name", ["unet", "controlnet"])
def test_a_branch_with_its_part_that_waits_when_an_error_ends_the_block_is_given_up(name: str) -> None:
    pipe = split(branches(), 2, cfg=2)
    found: list[Tensor] = []

    def leave() -> None:
        with fxpass.parallel(getattr(pipe, name)):
            found.append(first_branch(pipe))
            raise KeyError

    with pytest.raises(KeyError):
        leave()
    with pytest.raises(RuntimeError, match="the block of the parallel module was left with KeyError"):
        _ = found[0] + 0


@pytest.mark.parametrize("name", ["unet", "controlnet"])
def test_a_branch_whose_parts_have_changed_before_it_was_computed_is_an_error(name: str) -> None:
    pipe = split(branches(), 2, cfg=2)
    found = first_branch(pipe)
    with torch.no_grad():
        getattr(pipe, name).conv_in.weight.mul_(2)
    with pytest.raises(RuntimeError, match="the model's tensors were changed before it was used"):
        _ = found + 0


def test_workers_run_two_guidance_calls_with_a_part_each_at_once() -> None:
    check_workers(branches, 4, cfg=2)
