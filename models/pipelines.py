"""Adapters to diffusers pipelines: where they keep their denoisers, and how they announce a generation."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

DENOISERS = ("transformer", "unet", "transformer_2", "prior")  #: attributes that hold denoisers, the main one first


def denoisers(pipeline: Any) -> list[str]:
    """Names of the attributes of `pipeline` that are denoisers, the main one first."""
    return [name for name in DENOISERS if isinstance(getattr(pipeline, name, None), nn.Module)]


class Announcer:
    """Calls `begin(timesteps)` whenever the pipeline's scheduler gets its timesteps, which starts every generation.

    A copy of the scheduler also calls it. Called before each call of a denoiser, this object finds another scheduler
    that the user has set since: the generation that it started is announced then.
    """

    def __init__(self, pipeline: Any, begin: Callable[[Sequence[float]], None]) -> None:
        self._pipeline = weakref.ref(pipeline)
        self._begin = begin
        self._follow()

    def __call__(self) -> None:
        scheduler = self._follow()
        if scheduler is not None and getattr(scheduler, "timesteps", None) is not None:
            self._begin([float(each) for each in scheduler.timesteps])

    def _follow(self) -> Any:
        """The pipeline's scheduler if it is a new one."""
        scheduler = getattr(self._pipeline(), "scheduler", None)
        before = getattr(scheduler, "set_timesteps", None)
        if not isinstance(before, types.MethodType) or getattr(before, "begin", None) is self._begin:
            return None
        plain, begin = before.__func__, self._begin

        @functools.wraps(plain)
        def set_timesteps(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            result = plain(scheduler, *args, **kwargs)
            begin([float(each) for each in scheduler.timesteps])
            return result

        set_timesteps.begin = begin  # type: ignore[attr-defined]
        # a bound method, so that a deep copy of the scheduler binds it to itself
        scheduler.set_timesteps = types.MethodType(set_timesteps, scheduler)  # type: ignore[union-attr]
        return scheduler
