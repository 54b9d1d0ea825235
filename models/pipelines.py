"""Where pipelines keep their denoisers, and how they say that a generation begins."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

DENOISERS = ("transformer", "unet", "transformer_2", "prior")  #: attribute names; a pipeline may have several


def denoisers(pipeline: Any) -> list[str]:
    """The attributes of `pipeline` that are denoisers, the first the main one."""
    return [name for name in DENOISERS if isinstance(getattr(pipeline, name, None), nn.Module)]


def announce(pipeline: Any, begin: Callable[[Sequence[float]], None]) -> None:
    """Have `begin` called whenever the pipeline's scheduler is given its timesteps, as every generation does first.

    It is told which.

    A copy of the scheduler announces as well; one that the user puts in its place does not.
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

    # a bound method: a deep copy of the scheduler has it bound to itself
    scheduler.set_timesteps = types.MethodType(set_timesteps, scheduler)  # type: ignore[union-attr]
