"""Adapters to diffusers pipelines: where they keep their denoisers, and how they announce a generation."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

DENOISERS = ("transformer", "unet", "transformer_2", "prior")  #: attributes that hold denoisers, the main one first


def denoisers(pipeline: Any) -> list[str]:
    """Names of the attributes of `pipeline` that are denoisers, the main one first."""
    return [name for name in DENOISERS if isinstance(getattr(pipeline, name, None), nn.Module)]


def announce(pipeline: Any, begin: Callable[[Sequence[float]], None]) -> None:
    """Call `begin(timesteps)` whenever the pipeline's scheduler gets its timesteps, which starts every generation.

    A copy of the scheduler also calls it; another scheduler that the user sets later does not.
    """
    scheduler = getattr(pipeline, "scheduler", None)
    before = getattr(scheduler, "set_timesteps", None)
    if not isinstance(before, types.MethodType):
        return
    plain = before.__func__

    @functools.wraps(plain)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = plain(self, *args, **kwargs)
        begin([float(each) for each in self.timesteps])
        return result

    # a bound method, so that a deep copy of the scheduler binds it to itself
    scheduler.set_timesteps = types.MethodType(set_timesteps, scheduler)  # type: ignore[union-attr]
