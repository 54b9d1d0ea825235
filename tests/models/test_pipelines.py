"""How pipelines announce a generation."""

import copy
import inspect
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from fxpass.models.pipelines import announce


def test_a_scheduler_announces_each_generation_and_works_as_before() -> None:
    begun: list[Sequence[float]] = []
    scheduler: Any = DDIMScheduler()
    announce(SimpleNamespace(scheduler=scheduler), begun.append)
    scheduler.set_timesteps(7)
    scheduler.set_timesteps(num_inference_steps=9)
    assert list(map(len, begun)) == [7, 9]
    assert begun[1] == scheduler.timesteps.tolist()
    assert len(scheduler.timesteps) == 9


def test_the_signature_that_pipelines_look_at_is_kept() -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler()
    before = inspect.signature(scheduler.set_timesteps)
    announce(SimpleNamespace(scheduler=scheduler), lambda steps: None)
    assert inspect.signature(scheduler.set_timesteps) == before


def test_a_deep_copy_sets_its_own_timesteps() -> None:
    begun: list[Sequence[float]] = []
    scheduler: Any = DDIMScheduler()
    announce(SimpleNamespace(scheduler=scheduler), begun.append)
    other = copy.deepcopy(scheduler)
    scheduler.set_timesteps(5)
    other.set_timesteps(8)
    assert (len(scheduler.timesteps), len(other.timesteps), list(map(len, begun))) == (5, 8, [5, 8])


def test_a_pipeline_without_a_scheduler_is_left_alone() -> None:
    announce(SimpleNamespace(), lambda steps: None)
