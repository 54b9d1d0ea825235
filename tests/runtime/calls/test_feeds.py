"""A part that feeds a denoiser runs in one program with it, and no result of the part is gathered."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxpass
from fxpass.ir.advice import FxpassWarning
from fxpass.runtime.calls.deferred import DeferredTensor
from fxpass.runtime.calls.programs import GUARDED
from fxpass.runtime.lockstep import LockstepPlan
from tests.runtime.calls.feeding import (
    HINT,
    PROMPT,
    check_generation,
    check_workers,
    close,
    generation,
    joint_of,
    own_programs,
    pipeline,
    split,
)
from tests.runtime.plans import steps

GUESS = slice(1, None)  #: the half of the batch that has a prompt


def twice(each: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(each), each])


BETWEEN: dict[str, tuple[Callable[[Any], Any], slice]] = {
    "as they are": (lambda fed: fed, slice(None)),
    "scaled": (lambda fed: ([0.5 * each for each in fed[0]], fed[1] / 3), slice(None)),
    "scaled by a tensor": (lambda fed: ([each * torch.tensor(0.5) for each in fed[0]], -fed[1]), slice(None)),
    "added": (lambda fed: ([sum([each, 2 * each, 1]) for each in fed[0]], fed[1] + HINT[:, :1, ::2, ::2]), slice(None)),
    "for one half of the batch": (lambda fed: ([twice(each) for each in fed[0]], twice(fed[1])), GUESS),
    "cast": (lambda fed: (tuple(each.to(dtype=torch.float64).float() for each in fed[0]), fed[1]), slice(None)),
    "cut and joined": (lambda fed: ([torch.cat(each.chunk(2)) for each in fed[0]], fed[1][:, :]), slice(None)),
    "left out": (lambda fed: (None, fed[1]), slice(None)),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_what_a_pipeline_does_with_residuals_becomes_part_of_one_program(name: str) -> None:
    pipe = pipeline(*BETWEEN[name])
    expected = check_generation(pipe, 2)
    assert own_programs(pipe) == (0, 0)
    handle = fxpass.parallel(pipe.unet)
    assert handle.plan is fxpass.parallel(pipe.controlnet).plan
    assert handle.plan.bytes_by_role["output"] == 4 * expected[0].numel() // 2 * 2
    assert not fxpass.parallel(pipe.controlnet).traffic
    assert type(joint_of(pipe).model).__name__ == "Denoiser with SmallControlNet"
    assert {"part.hint", "denoiser.sample"} <= set(handle.plan.program.input_paths)


def test_no_byte_of_a_residual_is_gathered() -> None:
    pipe, apart = pipeline(), pipeline(lambda fed: ([each.tan().atan() for each in fed[0]], fed[1].tan().atan()))
    roles = []
    for each in (pipe, apart):
        split(each)
        generation(each, 3)
        alone = [fxpass.parallel(part).plan.bytes_by_role for part in (each.unet, each.controlnet)]
        roles.append(alone)
    assert own_programs(apart) == (1, 1)
    (joint, _), (unet, part) = roles
    result = unet["output"]
    assert joint["output"] == result
    assert part["output"] > result  # the residuals
    assert joint["halo"] <= unet["halo"] + part["halo"]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("half", [slice(None), slice(1, None)])
def test_displaced_steps_cover_the_part_and_generations_are_equal(inference: bool, half: slice) -> None:
    pipe = pipeline(BETWEEN["as they are" if half == slice(None) else "for one half of the batch"][0], half)
    expected = generation(pipe)
    split(pipe, strategy="displaced", warmup_steps=2)
    with torch.inference_mode(inference):
        first = generation(pipe)
    handle = fxpass.parallel(pipe.unet)
    assert handle._engine._generations.current().displaced == 4
    close(first[:2], expected[:2])
    for stale, exact in zip(first[2:], expected[2:], strict=True):
        assert 1e-6 < (stale - exact).norm() / exact.norm() < 0.05
    with torch.inference_mode(inference):
        again = generation(pipe)
    assert all(map(torch.equal, first, again))
    joint = joint_of(pipe)
    plan: Any = joint.plan
    stale = {each.path.partition(".")[0] for each in plan.exchanges if each.declared.fresh != "sync"}
    assert {"denoiser", "part"} <= stale


def test_a_scale_that_changes_gives_the_right_step_without_another_capture() -> None:
    pipe = pipeline()
    scales = (1.0, 1.0, 1.0, 0.0, 0.0)
    expected = generation(pipe, 5, scales)
    split(pipe, strategy="displaced", warmup_steps=1)
    found = generation(pipe, 5, scales)
    close([found[i] for i in (0, 3)], [expected[i] for i in (0, 3)])  # a step with another scale is exact
    for stale, exact in zip(found, expected, strict=True):
        assert (stale - exact).norm() / exact.norm() < 0.05
    joint = joint_of(pipe)
    assert len(joint.programs) == 1


def test_numbers_that_residuals_are_scaled_by_may_change_without_another_capture() -> None:
    pipe = pipeline(lambda fed: ([each * pipe.scale for each in fed[0]], fed[1] * (1 - pipe.scale)))
    split(pipe)
    for scale in (0.3, 0.0, 1.0):
        pipe.scale = scale
        found = generation(pipe, 1)
        joint = joint_of(pipe)
        assert len(joint.programs) == 1
        expected = pipeline(lambda fed, scale=scale: ([each * scale for each in fed[0]], fed[1] * (1 - scale)))
        close(found, generation(expected, 1))


USES: dict[str, Callable[[Tensor], Any]] = {
    "mean": lambda x: x.mean().item(),
    "numpy": lambda x: float(x.numpy().sum()),
    "repr": repr,
    "sin": lambda x: x.sin(),
    "comparison": lambda x: (x > 0).sum().item(),
}


@pytest.mark.parametrize("name", USES)
def test_any_other_use_of_a_residual_computes_it_and_the_denoiser_runs_with_the_part_all_the_same(name: str) -> None:
    pipe, seen = pipeline(), []

    def look(fed: Any) -> Any:
        seen.append(USES[name](fed[0][0]))
        seen.append(USES[name](fed[1][:, 1:] * 2))
        return [each * 2 for each in fed[0]], fed[1]

    pipe.between = look
    expected, values = generation(pipe, 2), list(seen)
    seen.clear()
    split(pipe)
    close(generation(pipe, 2), expected)
    if name != "repr":
        torch.testing.assert_close(seen, values)
    assert own_programs(pipe) == (0, 0)  # ranks need not agree on it


@pytest.mark.parametrize("inference", [False, True])
def test_a_residual_that_is_written_to_reaches_the_denoiser_as_it_is(inference: bool) -> None:
    def write(fed: Any) -> Any:
        fed[0][0][:, 1:] = 0.0
        return fed[0], fed[1].mul_(2)

    pipe = pipeline(write)
    check_generation(pipe, 3, inference)
    assert own_programs(pipe) == (1, 1)  # from the second step on the part does not wait


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("write", [lambda x: x.mul_(3.0), lambda x: x.clone().add_(5.0)], ids=["in place", "a clone"])
def test_a_residual_that_is_written_to_after_another_was_used_reaches_the_denoiser_as_it_is(
    write: Callable[[Tensor], Tensor], inference: bool
) -> None:
    def between(fed: Any) -> Any:
        fed[0][0].mean().item()
        return [write(fed[0][0] * 2)], fed[1]

    pipe = pipeline(between)
    check_generation(pipe, 2, inference)


@pytest.mark.parametrize("name", ["slice", "mask", "index"])
def test_residuals_may_be_indexed_by_tensors_that_change_afterwards(name: str) -> None:
    def between(fed: Any) -> Any:
        stop, one = torch.tensor(2), torch.tensor(0)
        keep = torch.ones(2, dtype=torch.bool)
        cut = {"slice": lambda x: x[:, :, :stop], "mask": lambda x: x[keep], "index": lambda x: x[one][None]}[name]
        used = cut(fed[0][0])
        for each in (stop, one, keep):
            each.logical_not_()
        return [fed[0][0] + used.mean()], fed[1]

    pipe = pipeline(between)
    check_generation(pipe, 2)


def test_inputs_that_change_before_the_denoiser_is_called_are_those_of_the_call() -> None:
    pipe = pipeline()
    sample, timestep = steps(1)[0]

    def run() -> Tensor:
        given = sample.clone()
        with torch.no_grad():
            residuals, middle = pipe.controlnet(given, timestep, hint=HINT)
            given.zero_()
            return pipe.unet(given, timestep, PROMPT, residuals=residuals, middle=middle)

    expected = run()
    split(pipe)
    close([run()], [expected])
    assert own_programs(pipe) == (0, 0)


def test_residuals_that_two_calls_of_the_denoiser_take_are_computed_apart_from_then_on() -> None:
    pipe = pipeline()

    def step(sample: Tensor, timestep: Tensor, scale: float) -> Tensor:
        residuals, middle = pipe.controlnet(sample, timestep, hint=HINT)
        one, two = (pipe.unet(sample, timestep, p, residuals=residuals, middle=middle) for p in (PROMPT, -PROMPT))
        return one + 2 * two

    pipe.step = step
    expected = generation(pipe, 3)
    split(pipe)
    close(generation(pipe, 3), expected)
    assert own_programs(pipe) == (1, 1)
    joint = joint_of(pipe)
    calls = joint.calls
    close(generation(pipe, 3), expected)
    assert joint.calls == calls == 1


def test_steps_that_take_residuals_twice_are_displaced_though_the_part_runs_alone() -> None:
    pipe = pipeline()

    def step(sample: Tensor, timestep: Tensor, scale: float) -> Tensor:
        residuals, middle = pipe.controlnet(sample, timestep, hint=HINT)
        fed = {"residuals": [2 * each for each in residuals], "middle": middle}
        one, two = (pipe.unet(sample, timestep, prompt, **fed) for prompt in (PROMPT, -PROMPT))
        return one + 2 * two

    pipe.step = step
    expected = generation(pipe)
    split(pipe, strategy="displaced", warmup_steps=2)
    generation(pipe)
    found, again = generation(pipe), generation(pipe)
    assert own_programs(pipe) == (1, 1)
    handle = fxpass.parallel(pipe.unet)
    assert handle.plan.program.fed == ("residuals.0", "middle")
    assert handle._engine._generations.current().displaced == 2 * 4
    close(found[:2], expected[:2])
    for stale, exact in zip(found[2:], expected[2:], strict=True):
        assert 1e-6 < (stale - exact).norm() / exact.norm() < 0.05
    assert all(map(torch.equal, found, again))


def test_branches_that_differ_in_residuals_alone_do_not_read_each_others_state() -> None:
    pipe = pipeline()

    def step(sample: Tensor, timestep: Tensor, scale: float) -> Tensor:
        residuals, middle = pipe.controlnet(sample, timestep, hint=HINT)
        one, two = (
            pipe.unet(sample, timestep, PROMPT, residuals=[k * each for each in residuals], middle=k * middle)
            for k in (3, 0)
        )
        return 2 * one - two

    pipe.step = step
    expected = generation(pipe)
    split(pipe, strategy="displaced", warmup_steps=2)
    for _ in range(2):
        found = generation(pipe)
        assert fxpass.parallel(pipe.unet)._engine._generations.current().displaced == 0
        close(found[:2], expected[:2])
        for stale, exact in zip(found[2:], expected[2:], strict=True):  # the part itself is displaced
            assert (stale - exact).norm() / exact.norm() < 0.02


def test_residuals_of_a_part_that_cannot_be_split_do_not_keep_steps_exact() -> None:
    pipe = pipeline()
    pipe.controlnet.conv_in.register_forward_hook(lambda module, args, output: output + 0 * torch.rand(1))
    split(pipe, strategy="displaced", warmup_steps=1)
    with pytest.warns(FxpassWarning, match="SmallControlNet.forward runs unsplit on every rank"):
        generation(pipe)
    assert fxpass.parallel(pipe.unet)._engine._generations.current().displaced == 5


def test_residuals_that_no_denoiser_takes_are_split_from_the_second_step_of_a_generation_on() -> None:
    pipe = pipeline(lambda fed: ([each.sin() for each in fed[0]], fed[1].cos()))
    expected = generation(pipe, 3)
    split(pipe)
    close(generation(pipe, 3), expected)
    assert own_programs(pipe) == (1, 1)
    assert fxpass.parallel(pipe.controlnet).traffic["output"]
    pipe.between = lambda fed: fed
    generation(pipe, 2)
    joint = joint_of(pipe)
    assert joint.calls == 2


def test_results_that_are_taken_otherwise_at_every_call_are_computed_apart_in_the_end() -> None:
    pipe = pipeline()
    split(pipe)
    found = []
    for k in range(1, 8):
        pipe.between = lambda fed, k=k: ([torch.cat(each.split([k, 16 - k], 2), 2) for each in fed[0]], fed[1])
        found = generation(pipe, 1)
    assert len(joint_of(pipe).programs) == GUARDED
    assert own_programs(pipe) == (1, 1)
    close(found, generation(pipeline(), 1))


def test_a_generation_that_ends_between_the_part_and_the_denoiser_leaves_nothing_to_the_next() -> None:
    pipe = pipeline()
    split(pipe, strategy="displaced", warmup_steps=1)
    first = generation(pipe)

    def stop(fed: Any) -> Any:
        raise KeyboardInterrupt

    pipe.between = stop
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            generation(pipe)
    pipe.between = lambda fed: fed
    assert all(map(torch.equal, first, generation(pipe)))
    assert own_programs(pipe) == (0, 0)


def test_an_error_in_the_program_of_both_reaches_the_caller_and_the_next_generation_is_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe = pipeline()
    split(pipe, strategy="displaced", warmup_steps=1)
    first = generation(pipe)

    def fail(self: Any, *args: Any) -> Any:
        raise ValueError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(LockstepPlan, "run", fail)
        with pytest.raises(ValueError, match="out of luck"):
            generation(pipe)
    assert all(map(torch.equal, first, generation(pipe)))


def test_a_part_that_is_changed_between_its_call_and_the_denoisers_is_an_error() -> None:
    pipe = pipeline()
    split(pipe)
    generation(pipe, 1)

    def change(fed: Any) -> Any:
        pipe.controlnet.gain = 2.0
        return fed

    pipe.between = change
    with pytest.raises(RuntimeError, match=r"was not computed: the module was changed .* before or after both calls"):
        generation(pipe, 1)
    pipe.between = lambda fed: fed
    found = generation(pipe, 1)
    fxpass.restore(pipe)
    close(found, generation(pipe, 1))

    def write(fed: Any) -> Any:
        pipe.controlnet.hint.weight.mul_(2)
        return fed

    split(pipe)
    pipe.between = write
    with pytest.raises(RuntimeError, match=r"the module was changed \(its tensors"):
        generation(pipe, 1)


def test_results_that_were_used_before_the_part_changed_are_those_of_its_call() -> None:
    pipe = pipeline()
    expected = generation(pipe, 1)
    split(pipe)

    def change(fed: Any) -> Any:
        fed[1].mean().item()
        pipe.controlnet.gain = 2.0
        return fed

    pipe.between = change
    close(generation(pipe, 1), expected)


def test_a_change_of_either_part_between_two_steps_is_seen() -> None:
    pipe = pipeline()
    split(pipe)
    generation(pipe, 1)
    pipe.controlnet.gain = 0.5
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(2)
    found = generation(pipe, 1)
    fxpass.restore(pipe)
    close(found, generation(pipe, 1))


def test_batched_guidance_is_divided_and_calls_of_each_branch_run_with_residuals_that_are_gathered() -> None:
    pipe = pipeline()
    expected = generation(pipe, 2)
    split(pipe, cfg=2)
    close(generation(pipe, 2), expected)
    plan: Any = fxpass.parallel(pipe.unet).plan
    assert plan.mesh.groups == 2
    assert plan.bytes_by_role == {"output": 4 * expected[0].numel()}


def test_a_plan_of_both_parts_is_saved_and_used_and_one_that_does_not_fit_lets_them_run_apart(tmp_path: Path) -> None:
    pipe = pipeline()
    expected = generation(pipe, 1)
    split(pipe)
    generation(pipe, 1)
    plan: Any = fxpass.parallel(pipe.unet).plan
    plan.save(tmp_path / "joint.json")
    split(pipe, plan=tmp_path / "joint.json")
    close(generation(pipe, 1), expected)
    assert fxpass.parallel(pipe.unet).plan.fingerprint == plan.fingerprint
    pipe.between = lambda fed: (
        [each.tan().atan() for each in fed[0]],
        fed[1].tan().atan(),
    )  # each runs by a plan of its own
    split(pipe)
    generation(pipe, 2)
    for each in (pipe.unet, pipe.controlnet):
        handle: Any = fxpass.parallel(each)
        handle.plan.save(tmp_path / "apart.json")
    pipe.between = lambda fed: fed
    split(pipe, plan=tmp_path / "apart.json")
    close(generation(pipe, 2), generation(pipeline(), 2))
    assert own_programs(pipe) == (1, 1)


def test_threads_that_generate_at_once_get_what_each_gets_alone() -> None:
    seeds = (0, 1, 2)
    pipe = pipeline(lambda fed: ([2 * each for each in fed[0]], fed[1][:, :]))

    def run(seed: int) -> list[Tensor]:
        pipe.scheduler.set_timesteps(4)
        with torch.no_grad():
            return [pipe.step(*given) for given in steps(4, seed=seed)]

    split(pipe, strategy="displaced", warmup_steps=1)
    expected = [run(seed) for seed in seeds]
    with ThreadPoolExecutor(len(seeds)) as pool:
        found = list(pool.map(run, seeds))
    for one, other in zip(found, expected, strict=True):
        assert all(map(torch.equal, one, other))
    assert own_programs(pipe) == (0, 0)


def test_restore_and_close_leave_no_program_of_both_parts() -> None:
    pipe = pipeline()
    split(pipe)
    generation(pipe, 1)
    joint = joint_of(pipe)
    fxpass.restore(pipe.controlnet)
    assert not len(joint.programs)
    found = generation(pipe, 1)
    fxpass.restore(pipe)
    close(found, generation(pipe, 1))
    assert "forward" not in {**vars(pipe.unet), **vars(pipe.controlnet)}


def test_a_residual_that_is_used_after_restore_has_its_value() -> None:
    pipe = pipeline()
    sample, timestep = steps(1)[0]
    with torch.no_grad():
        expected = pipe.controlnet(sample, timestep, hint=HINT)[1]
        split(pipe)
        found = pipe.controlnet(sample, timestep, hint=HINT)[1]
        assert isinstance(found, DeferredTensor)
        fxpass.restore(pipe)
    torch.testing.assert_close(found + 0, expected)


def test_under_autocast_the_part_runs_by_itself() -> None:
    pipe = pipeline()
    with torch.autocast("cpu", torch.bfloat16):
        expected = generation(pipe, 1)
        split(pipe)
        found = generation(pipe, 1)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0.02)
    assert own_programs(pipe) == (1, 1)


def test_workers_run_both_parts_in_one_program() -> None:
    check_workers(pipeline, 2)
