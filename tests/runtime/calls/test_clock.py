"""Which steps may be displaced: with diffusers' samplers, with guidance, and where a call only looks like the next."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fxpass.ir.inputs import TIMESTEP
from fxpass.runtime.calls.clock import CONTEXTS, MAX_GAP, Clock, _centered
from fxpass.runtime.calls.generation import Generation, Generations
from fxpass.runtime.executor import on_host

PROMPT, OTHER = torch.ones(1, 3), torch.zeros(1, 3)
SAMPLERS = {
    "ddim": DDIMScheduler,
    "dpm": DPMSolverMultistepScheduler,
    "euler a": EulerAncestralDiscreteScheduler,
    "flow": FlowMatchEulerDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "pndm": PNDMScheduler,
}


def clock(warmup: int = 2) -> Clock:
    return Clock(timestep=1, sample=0, warmup_steps=warmup, names=("sample", "timestep", "prompt"))


def trajectory(name: str, count: int, seed: int, start: int = 0) -> list[tuple[Tensor, Tensor]]:
    """What a pipeline would give the denoiser: (sample, timestep), from step `start` on (img2img)."""
    scheduler: Any = SAMPLERS[name]()
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randn(1, 4, 16, 16, generator=generator) * 0.5
    scheduler.set_timesteps(count)
    noise = torch.randn(1, 4, 16, 16, generator=generator)
    sample = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    if start:
        scheduler.set_begin_index(start) if hasattr(scheduler, "set_begin_index") else None
        at = scheduler.timesteps[start : start + 1]
        sample = scheduler.add_noise(clean, noise, at) if hasattr(scheduler, "add_noise") else noise
    seen = []
    for t in scheduler.timesteps[start:]:
        given = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
        seen.append((given, t))
        guess = noise - clean if name == "flow" else noise
        sample = scheduler.step(guess, t, sample).prev_sample
    return seen


def announced(timesteps: Sequence[float] = ()) -> Generation:
    return Generation(Generations(), timesteps, announced=True)


ANNOUNCED = announced()


def exact(
    watch: Clock, calls: list[tuple[Tensor, Tensor]], prompt: Tensor = PROMPT, generation: Generation = ANNOUNCED
) -> list[bool]:
    return [watch.step([sample, time, prompt], generation).exact for sample, time in calls]


@pytest.mark.parametrize("count", [10, 20, 50])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_generation_is_exact_for_its_warm_up_and_displaced_after(name: str, count: int) -> None:
    calls = trajectory(name, count, 0)
    found = exact(clock(), calls)
    # in few steps, "euler a" replaces most of the first sample by fresh noise, which is taken for a new beginning
    first = 3 if (name, count) == ("euler a", 10) else 2
    assert found == [True] * first + [False] * (len(calls) - first)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_next_generation_of_the_same_prompt_begins_exactly(name: str) -> None:
    watch = clock()
    exact(watch, trajectory(name, 10, 0))
    assert exact(watch, trajectory(name, 20, 1))[:3] == [True, True, False]


@pytest.mark.parametrize("name", ["ddim", "flow", "dpm", "euler a"])
def test_an_interrupted_generation_is_not_continued_by_img2img_at_a_lower_timestep(name: str) -> None:
    watch = clock()
    exact(watch, trajectory(name, 20, 0)[:8])
    after = trajectory(name, 20, 1, start=10)
    assert exact(watch, after)[:3] == [True, True, False]


@pytest.mark.parametrize("warmup", [1, 2])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_generation_that_starts_later_from_the_same_noise_starts_exactly(name: str, warmup: int) -> None:
    watch = clock(warmup)
    exact(watch, trajectory(name, 20, 0)[:8])
    assert exact(watch, trajectory(name, 20, 0)[16:])[:warmup] == [True] * warmup


@pytest.mark.parametrize("seeds", [range(6), [0] * 6], ids=["other noise", "the same noise"])
def test_one_step_generations_in_a_row_are_all_exact(seeds: Sequence[int]) -> None:
    watch = clock(warmup=1)
    for seed in seeds:
        assert exact(watch, trajectory("ddim", 1, seed)) == [True]


@pytest.mark.parametrize("warmup", [1, 2])
def test_the_same_timestep_again_and_again_is_no_generation(warmup: int) -> None:
    """Other pictures under the same noise: a loss, a video frame by frame."""
    noise = torch.randn(1, 4, 16, 16)
    pictures = [noise + 0.3 * torch.randn(1, 4, 16, 16) for _ in range(9)]
    assert all(exact(clock(warmup), [(x, torch.tensor(900)) for x in pictures]))


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0, 12.0])
@pytest.mark.parametrize("count", [4, 8, 50])
def test_a_schedule_of_growing_steps_is_one_generation(count: int, shift: float) -> None:
    times = [shift * t / (1 + (shift - 1) * t) for t in torch.linspace(1, 0, count + 1)[:-1].tolist()]
    noise, picture = torch.randn(2, 1, 4, 16, 16)
    calls = [(t * noise + (1 - t) * picture, torch.tensor(t)) for t in times]
    assert exact(clock(warmup=1), calls) == [True] + [False] * (count - 1)


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (1, 1, 8)])
def test_a_sample_without_structure_starts_a_new_generation(shape: tuple[int, ...]) -> None:
    calls = [(torch.randn(shape), torch.tensor(9 - k)) for k in range(4)]
    assert all(exact(clock(warmup=1), calls))


def test_a_prompt_that_is_written_to_behind_torchs_back_is_another_prompt() -> None:
    watch, prompt = clock(warmup=1), PROMPT.clone()
    (a, b, c, *_) = trajectory("ddim", 20, 0)
    assert exact(watch, [a, b], prompt) == [True, False]
    prompt.data.zero_()
    assert exact(watch, [c], prompt) == [True]


def test_two_guidance_branches_have_contexts_of_their_own() -> None:
    watch = clock()
    for k, (sample, time) in enumerate(trajectory("ddim", 10, 0)):
        first, second = (watch.step([sample, time, prompt.clone()], ANNOUNCED) for prompt in (PROMPT, OTHER))
        assert first.context != second.context
        assert first.exact == second.exact == (k < 2)


def test_batched_guidance_is_one_context() -> None:
    watch = clock()
    steps = [watch.step([torch.cat([x, x]), t, PROMPT], ANNOUNCED) for x, t in trajectory("ddim", 10, 0)]
    assert {step.context for step in steps} == {0}


def test_interleaved_generations_from_different_noise_never_share_a_step() -> None:
    watch = clock(warmup=1)
    for first, second in zip(trajectory("ddim", 10, 0), trajectory("ddim", 10, 1), strict=True):
        assert exact(watch, [first, second]) == [True, True]


def test_timesteps_per_sample_must_all_fall() -> None:
    watch = clock(warmup=1)
    (x, _), (y, _), (z, _), *_ = trajectory("ddim", 20, 0)
    assert exact(watch, [(x, torch.tensor([900, 500])), (y, torch.tensor([800, 500]))]) == [True, False]
    assert exact(watch, [(z, torch.tensor([700, 501]))]) == [True]


def test_a_changed_prompt_begins_again_and_takes_the_place_of_what_was_left() -> None:
    watch = clock(warmup=1)
    calls = trajectory("ddim", 50, 0)
    for k, (sample, time) in enumerate(calls):
        assert watch.step([sample, time, torch.full((1, 3), float(k))], ANNOUNCED).exact
    assert len(watch.contexts) <= CONTEXTS
    assert {context.number for context in watch.contexts} <= set(range(CONTEXTS))


def test_a_prompt_that_is_changed_in_place_is_another_prompt() -> None:
    watch, prompt = clock(warmup=1), PROMPT.clone()
    (a, b, c, *_) = trajectory("ddim", 20, 0)
    assert exact(watch, [a, b], prompt) == [True, False]
    prompt[0, 0] = 5
    assert exact(watch, [c], prompt) == [True]


def test_the_least_recently_used_context_starts_exactly_again() -> None:
    watch = clock(warmup=1)
    calls = trajectory("ddim", 20, 0)
    exact(watch, calls[:2])
    for k in range(MAX_GAP + 1):
        watch.step([*calls[0], torch.full((1, 3), 7.0 + k % 2)], ANNOUNCED)
    assert exact(watch, calls[2:3]) == [True]


def test_after_a_failed_step_no_earlier_state_is_read() -> None:
    watch = clock(warmup=1)
    calls = trajectory("ddim", 20, 0)
    assert exact(watch, calls[:3]) == [True, False, False]
    watch.restart()
    assert exact(watch, calls[3:5]) == [True, False]


@pytest.mark.parametrize("warmup", [1, 2, 4])
@pytest.mark.parametrize("loops", [2, 3])
def test_loops_that_take_turns_are_exact_where_nobody_announced_them(loops: int, warmup: int) -> None:
    """From one picture, with little noise of their own: their samples are alike."""
    picture = torch.randn(1, 4, 16, 16)
    noises = torch.randn(loops, 1, 4, 16, 16)
    calls = [(picture + 0.3 * noise, torch.tensor(500 - 50 * k)) for k in range(8) for noise in noises]
    assert all(exact(clock(warmup), calls, generation=Generations().current()))


@pytest.mark.parametrize(("name", "displaced"), [("ddim", 18), ("heun", 0)])
def test_a_repeated_timestep_is_exact_where_nobody_announced_the_generation(name: str, displaced: int) -> None:
    found = exact(clock(), trajectory(name, 20, 0), generation=Generations().current())
    assert found.count(False) == displaced


def test_loops_that_are_entered_in_turns_have_contexts_of_their_own() -> None:
    watch = clock(warmup=2)
    generations = Generations()
    loops = [generations.new(()) for _ in range(2)]
    steps = []
    for sample, time in trajectory("ddim", 6, 0):
        for loop in loops:
            with loop:
                steps.append(watch.step([sample, time, PROMPT], generations.current()))
    assert [step.exact for step in steps] == [True] * 4 + [False] * 8
    assert {step.context for step in steps[::2]}.isdisjoint(step.context for step in steps[1::2])


def test_an_entered_generation_may_rise_and_repeat_its_timesteps() -> None:
    loop = Generations().new(())
    calls = [(torch.randn(1, 4, 8, 8), torch.tensor(t)) for t in (100, 300, 300, 300, 900)]
    assert exact(clock(warmup=1), calls, generation=loop) == [True] + [False] * 4


def test_threads_and_announcements_have_generations_of_their_own() -> None:
    generations = Generations()
    here = generations.current()
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(generations.current).result()
    assert here is generations.current() is not there
    generations.begin([3.0, 2.0])
    assert here.ended
    assert (generations.current().announced, generations.current().sure) == (True, False)
    with generations.new(()) as outer:
        with generations.new(()) as inner:
            assert generations.current() is inner
        assert generations.current() is outer
    assert generations.current().timesteps == [3.0, 2.0]


def test_a_new_generation_takes_the_places_of_the_one_before() -> None:
    watch, generations = clock(), Generations()
    for seed in range(6):
        generations.begin(())
        for sample, time in trajectory("ddim", 4, seed):
            for prompt in (PROMPT, OTHER):
                watch.step([sample, time, prompt], generations.current())
    assert sorted(context.number for context in watch.contexts) == [0, 1]


def cooled(calls: list[tuple[Tensor, Tensor]], known: list[tuple[Tensor, Tensor]], cooldown: int) -> list[bool]:
    """Which of `calls` are exact if the timesteps of `known` were announced."""
    watch = Clock(timestep=1, sample=0, warmup_steps=2, cooldown_steps=cooldown)
    return exact(watch, calls, generation=announced([float(time) for _, time in known]))


@pytest.mark.parametrize("cooldown", [1, 3])
@pytest.mark.parametrize("name", ["ddim", "dpm", "flow", "heun", "pndm"])
def test_the_last_timesteps_are_exact_where_they_are_known(name: str, cooldown: int) -> None:
    calls = trajectory(name, 20, 0)
    last = sorted({float(time) for _, time in calls})[:cooldown]
    assert cooled(calls, calls, cooldown) == [i < 2 or float(calls[i][1]) in last for i in range(len(calls))]


@pytest.mark.parametrize("given", ["thousandths", "half precision", "one per sample"])
def test_the_last_step_is_found_in_whatever_form_the_model_is_given_its_timestep(given: str) -> None:
    calls = trajectory("flow" if given == "thousandths" else "ddim", 50, 0)
    forms = {
        "thousandths": lambda time: time / 1000,
        "half precision": lambda time: time.to(torch.bfloat16),
        "one per sample": lambda time: time.expand(4),
    }
    found = cooled([(sample, forms[given](time)) for sample, time in calls], calls, 1)
    assert found == [True] * 2 + [False] * 47 + [True]


@pytest.mark.parametrize("unit", [1.0, 1e-3])
def test_steps_are_displaced_where_a_pipeline_counts_upwards_from_its_schedulers_first_timestep(unit: float) -> None:
    known = trajectory("flow", 20, 0)
    calls = [(sample, (1000 - time) * unit) for sample, time in known]
    assert float(calls[0][1]) == 0
    assert cooled(calls, known, 2) == [True] * 2 + [False] * 16 + [True] * 2
    again = [*calls, *calls]  # the second one is not announced: its timestep falls
    assert cooled(again, known, 2) == 2 * ([True] * 2 + [False] * 16 + [True] * 2)


def test_timesteps_that_fall_though_they_could_be_meant_to_rise_are_followed() -> None:
    calls = trajectory("ddim", 8, 0)  # 875 … 0
    known = [(sample, 1000 - time) for sample, time in calls]  # 125 … 1000
    assert cooled([(sample, time * 1.0) for sample, time in calls], known, 0) == [True] * 2 + [False] * 6


@pytest.mark.parametrize(("start", "count"), [(17, 3), (18, 3), (18, 5), (19, 1)])
def test_all_steps_may_be_final_where_few_timesteps_are_left(start: int, count: int) -> None:
    known = trajectory("ddim", 20, 0)
    assert cooled(trajectory("ddim", 20, 0, start=start), known, count) == [True] * (20 - start)


def test_img2img_ends_exactly_though_it_leaves_out_the_first_timesteps() -> None:
    found = cooled(trajectory("ddim", 20, 0, start=12), trajectory("ddim", 20, 0), 1)
    assert found == [True] * 2 + [False] * 5 + [True]


@pytest.mark.parametrize("known", ["none", "of another generation", "unlike ones"])
def test_no_step_is_taken_for_the_last_where_the_timesteps_are_not_known(known: str) -> None:
    calls = trajectory("ddim", 20, 0)
    if known == "unlike ones":
        calls = [(sample, torch.stack([time, time + 5])) for sample, time in calls]
        assert cooled(calls, trajectory("ddim", 20, 0), 1) == [True] * 2 + [False] * 18
    else:
        other = [(sample, time + 17.3) for sample, time in calls] if known == "of another generation" else []
        assert cooled(calls, other, 1) == [True] * 2 + [False] * 18


class NoReads(TorchFunctionMode):
    """Refuses what makes the host wait for a value on a device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        assert name not in ("item", "tolist", "__bool__", "__float__", "__int__", "equal", "cpu", "numpy"), name
        return func(*args, **(kwargs or {}))


def test_facts_are_gathered_without_a_wait_for_the_device() -> None:
    watch, calls = clock(), trajectory("ddim", 6, 0)
    for sample, time in calls:
        with NoReads():
            facts = watch.facts([sample, time, PROMPT], ANNOUNCED)
        values = on_host(facts)
        assert len(values) == 1 + 2 * CONTEXTS
        watch.step([sample, time, PROMPT], ANNOUNCED, values)
    assert values[:3] == [float(calls[-1][1]), 1, 1]


def times(calls: list[tuple[Tensor, Tensor]]) -> list[float]:
    return [float(time) for _, time in calls]


def test_a_generation_with_displaced_steps_is_not_idle() -> None:
    calls = trajectory("ddim", 10, 0)
    generation = announced(times(calls))
    exact(clock(), calls, generation=generation)
    assert (generation.finished, generation.displaced, generation.idle()) == (True, 8, "")


def test_a_generation_of_warm_up_steps_alone_says_so_at_its_last_timestep() -> None:
    calls = trajectory("ddim", 4, 0)
    generation, watch = announced(times(calls)), clock(warmup=4)
    exact(watch, calls[:-1], generation=generation)
    assert generation.idle() == ""
    exact(watch, calls[-1:], generation=generation)
    assert generation.idle() == "the first steps are exact (warmup_steps is 4): 4 of 4"


def test_img2img_with_few_timesteps_left_says_so() -> None:
    generation = announced(times(trajectory("ddim", 20, 0)))
    exact(clock(), trajectory("ddim", 20, 0, start=18), generation=generation)
    assert "the first steps are exact (warmup_steps is 2): 2 of 2" in generation.idle()


def test_inputs_that_change_from_step_to_step_are_named() -> None:
    calls = trajectory("ddim", 6, 0)
    generation, watch = announced(times(calls)), clock()
    for k, (sample, time) in enumerate(calls):
        watch.step([sample, time, PROMPT + k], generation)
    assert "change from step to step (prompt): 5 of 6" in generation.idle()


def test_samples_that_hardly_correlate_are_named() -> None:
    calls = [(torch.randn(1, 4, 16, 16), torch.tensor(9.0 - k)) for k in range(8)]
    generation = announced(times(calls))
    exact(clock(), calls, generation=generation)
    assert "the sample changed too much between two steps" in generation.idle()


def test_timesteps_that_repeat_in_a_generation_that_nobody_announced_are_named() -> None:
    calls = [each for each in trajectory("ddim", 15, 0) for _ in range(2)]
    generation = Generation(Generations())
    exact(clock(warmup=1), calls, generation=generation)
    assert "module.generation" in generation.idle()


@pytest.mark.parametrize("falling", ["all alike", "one after the other"])
def test_of_a_timestep_for_each_frame_the_largest_of_a_sample_counts(falling: str) -> None:
    calls = trajectory("ddim", 10, 0)
    watch = clock()
    found = []
    for sample, time in calls:
        frames = torch.tensor([1.0, 1.0, 1.0] if falling == "all alike" else [1.0, 0.5, 0.0])
        found.append(watch.step([sample, time * frames.expand(1, 3), PROMPT], ANNOUNCED).exact)
    assert found == [True] * 2 + [False] * 8


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 3, 5, 4), (2, 3, 2, 5, 4)])
def test_what_all_tokens_or_pixels_have_in_common_does_not_correlate(shape: tuple[int, ...]) -> None:
    channels = torch.arange(1.0, 4)
    same = channels.view(1, 1, 3) if len(shape) == 3 else channels.view(1, 3, *[1] * (len(shape) - 2))
    assert _centered(same.expand(shape)).abs().max() == 0
    assert _centered(torch.randn(shape)).abs().max() > 0.1


def test_without_a_timestep_all_steps_are_exact() -> None:
    watch = Clock(timestep=None, sample=0, warmup_steps=1)
    assert all(watch.step([torch.ones(1, 4, 8, 8)], ANNOUNCED).exact for _ in range(4))


@pytest.mark.parametrize("path", ["timestep", "timesteps", "t", "args.1.sigma", "noise_labels", "batch.time"])
def test_names_of_timesteps(path: str) -> None:
    assert TIMESTEP.search(path)


@pytest.mark.parametrize("path", ["text", "time_ids", "added_cond_kwargs.time_ids", "attention", "latents"])
def test_names_of_other_inputs(path: str) -> None:
    assert not TIMESTEP.search(path)
