"""How pipelines announce a generation."""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from fxpass.models.pipelines import Announcer
from tests.runtime.plans import Pipeline


def test_a_scheduler_announces_each_generation_and_works_as_before() -> None:
    begun: list[Sequence[float]] = []
    scheduler: Any = DDIMScheduler()
    Announcer(Pipeline(scheduler=scheduler), begun.append)
    scheduler.set_timesteps(7)
    scheduler.set_timesteps(num_inference_steps=9)
    assert list(map(len, begun)) == [7, 9]
    assert begun[1] == scheduler.timesteps.tolist()
    assert len(scheduler.timesteps) == 9


def test_the_signature_that_pipelines_look_at_is_kept() -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler()
    before = inspect.signature(scheduler.set_timesteps)
    Announcer(Pipeline(scheduler=scheduler), lambda steps: None)
    assert inspect.signature(scheduler.set_timesteps) == before


def test_a_deep_copy_sets_its_own_timesteps() -> None:
    begun: list[Sequence[float]] = []
    scheduler: Any = DDIMScheduler()
    Announcer(Pipeline(scheduler=scheduler), begun.append)
    other = copy.deepcopy(scheduler)
    scheduler.set_timesteps(5)
    other.set_timesteps(8)
    assert (len(scheduler.timesteps), len(other.timesteps), list(map(len, begun))) == (5, 8, [5, 8])


def test_a_pipeline_without_a_scheduler_is_left_alone() -> None:
    Announcer(Pipeline(), lambda steps: None)


def test_another_scheduler_is_found_at_a_call_and_announces_itself_from_then_on() -> None:
    begun: list[Sequence[float]] = []
    pipeline: Any = Pipeline(scheduler=DDIMScheduler())
    announcer = Announcer(pipeline, begun.append)
    announcer()
    assert not begun
    pipeline.scheduler = DDIMScheduler()
    pipeline.scheduler.set_timesteps(6)  # nobody hears of it
    announcer()
    announcer()
    pipeline.scheduler.set_timesteps(3)
    assert list(map(len, begun)) == [6, 3]
