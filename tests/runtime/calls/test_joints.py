"""What runs a denoiser with a part that feeds it ends in time, and is made once."""

from __future__ import annotations

import copy
import gc
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

import fxpass
from fxpass.ir.advice import FxpassWarning
from fxpass.runtime.calls.feeds import JointEngine
from fxpass.runtime.calls.programs import GUARDED
from tests.runtime.calls.feeding import (
    HINT,
    PROMPT,
    Denoiser,
    close,
    generation,
    joint_of,
    own_programs,
    pipeline,
    split,
)
from tests.runtime.plans import steps


class Drawing(Denoiser):
    def forward(self, sample: Tensor, *given: Any, generator: torch.Generator, **named: Any) -> Tensor:
        return super().forward(sample + torch.randn(sample.shape, generator=generator), *given, **named)


def test_a_denoiser_that_draws_random_numbers_runs_in_one_program_with_its_part() -> None:
    pipe = pipeline()
    pipe.unet = Drawing().eval()
    generators: list[torch.Generator] = []

    def step(sample: Tensor, timestep: Tensor, scale: float) -> Tensor:
        residuals, middle = pipe.controlnet(sample, timestep, hint=HINT)
        return pipe.unet(sample, timestep, PROMPT, residuals=residuals, middle=middle, generator=generators[-1])

    def run() -> list[Tensor]:
        generators.append(torch.Generator().manual_seed(0))
        return [*generation(pipe, 3), torch.rand(1, generator=generators[-1])]

    pipe.step = step
    expected = run()
    split(pipe)
    close(run(), expected)
    close(run(), expected)
    assert own_programs(pipe) == (0, 0)
    assert len(joint_of(pipe).programs) == 1


def test_a_copy_of_a_residual_that_a_pipeline_makes_is_a_plain_tensor_without_a_gradient() -> None:
    pipe = pipeline()
    sample, timestep = steps(1)[0]
    with torch.no_grad():
        expected = pipe.controlnet(sample, timestep, hint=HINT)
        split(pipe)
        found = copy.deepcopy(pipe.controlnet(sample, timestep, hint=HINT))
    for one, other in zip((*found[0], found[1]), (*expected[0], expected[1]), strict=True):
        assert type(one) is Tensor
        assert not one.requires_grad
        torch.testing.assert_close(one, other)


def test_a_call_of_the_part_ends_with_its_results_without_the_garbage_collector() -> None:
    pipe = pipeline()
    split(pipe)
    generation(pipe, 1)
    feeds: list[weakref.ref[Any]] = []

    def look(fed: Any) -> Any:
        feeds.append(weakref.ref(fed[1].source))
        return fed

    pipe.between = look
    gc.collect()
    gc.disable()
    try:
        generation(pipe, 2)
        assert [feed() for feed in feeds] == [None, None]
    finally:
        gc.enable()


class ByPosition(Denoiser):
    def forward(self, sample: Tensor, timestep: Tensor, prompt: Tensor, /, residuals: Any, middle: Tensor) -> Tensor:
        return super().forward(sample, timestep, prompt, residuals, middle)


class Rest(Denoiser):
    def forward(self, sample: Tensor, timestep: Tensor, *rest: Tensor, residuals: Any, middle: Tensor) -> Tensor:
        return super().forward(sample, timestep, *rest, residuals=residuals, middle=middle)


@pytest.mark.parametrize("kind", [ByPosition, Rest])
def test_arguments_that_are_passed_by_position_stay_so_in_the_program_of_both_parts(kind: type[Denoiser]) -> None:
    pipe = pipeline()
    pipe.unet = kind().eval()
    expected = generation(pipe, 1)
    split(pipe)
    close(generation(pipe, 1), expected)
    assert own_programs(pipe) == (0, 0)


def test_generations_of_one_step_at_several_sizes_keep_their_programs_of_both_parts() -> None:
    pipe = pipeline()
    split(pipe)
    sizes = (4, 8, 12, 16)
    for rows in (*sizes, 16, 4):
        hint = HINT[:, :, :rows]

        def step(sample: Tensor, timestep: Tensor, scale: float, rows: int = rows, hint: Tensor = hint) -> Tensor:
            residuals, middle = pipe.controlnet(sample[:, :, :rows], timestep, hint=hint)
            return pipe.unet(sample[:, :, :rows], timestep, PROMPT, residuals=residuals, middle=middle)

        pipe.step = step
        generation(pipe, 1)
    assert own_programs(pipe) == (0, 0)
    assert len(joint_of(pipe).programs) == len(sizes)


@pytest.mark.parametrize("name", ["controlnet", "unet"])
def test_a_change_of_a_part_before_each_of_many_generations_of_one_step_leaves_them_in_one_program(name: str) -> None:
    pipe = pipeline()
    split(pipe)
    for gain in range(GUARDED + 2):
        getattr(pipe, name).gain = float(gain)
        generation(pipe, 1)
    joint = joint_of(pipe)
    assert joint.programs.changes == GUARDED + 1
    assert own_programs(pipe) == (0, 0)


def test_a_denoiser_that_was_closed_is_not_run_with_its_part() -> None:
    pipe = pipeline()
    split(pipe)
    generation(pipe, 1)
    fxpass.parallel(pipe.unet).close()
    with pytest.raises(RuntimeError, match="this parallel module was closed"):
        generation(pipe, 1)
    joints: Any = fxpass.parallel(pipe.unet)._engine.joints
    assert not list(joints)


def test_a_call_that_comes_too_late_finds_no_program_of_both_parts() -> None:
    pipe = pipeline()
    split(pipe)
    generation(pipe, 1)
    joint = joint_of(pipe)
    joint.release()
    close(generation(pipe, 1), generation(pipeline(), 1))
    assert not len(joint.programs)


def test_two_threads_share_the_programs_of_both_parts() -> None:
    pipe = pipeline()
    split(pipe)
    together = Barrier(2)

    class Slow(JointEngine):
        def __init__(self, *args: Any) -> None:
            made.append(self)
            time.sleep(0.1)
            super().__init__(*args)

    def run() -> None:
        together.wait()
        generation(pipe, 1)

    made: list[JointEngine] = []
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr("fxpass.runtime.calls.feeds.JointEngine", Slow)
        for each in [pool.submit(run) for _ in range(2)]:
            each.result()
    assert len(made) == 1


def test_a_part_that_was_restored_and_dropped_is_freed() -> None:
    pipe = pipeline()
    split(pipe)
    generation(pipe, 1)
    part = weakref.ref(fxpass.restore(pipe.controlnet))
    del pipe.controlnet
    gc.collect()
    assert part() is None
    joints: Any = fxpass.parallel(pipe.unet)._engine.joints
    assert not list(joints)


def test_a_warning_about_a_program_of_both_parts_names_their_classes() -> None:
    pipe = pipeline()
    split(pipe, strategy="displaced", warmup_steps=40)
    with pytest.warns(FxpassWarning, match="^Denoiser with SmallControlNet: no step of this generation was displaced"):
        generation(pipe, 25, (1.0,) * 25)
