"""Adapters to diffusers pipelines: where they keep their denoisers, and how they announce a generation."""

from __future__ import annotations

import functools
import inspect
import re
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

MAIN = ("transformer", "unet", "transformer_2", "prior")  #: attributes that hold denoisers, the main one first
HALVES = ("decode", "encode")  #: methods of an autoencoder
TIMESTEP = re.compile(r"t|ts|times?|timesteps?|timestep_ratio|sigmas?|noise_(levels?|labels?|time)|decoder_noise_time")
BESIDE = re.compile(r"ControlNet|Adapter")  #: classes that work beside a denoiser: what they return is gathered whole


def denoisers(pipeline: Any) -> list[str]:
    """Names of the attributes of `pipeline` that are denoisers, the main one first.

    A denoiser is a module whose forward takes a timestep, under whatever name it is kept, or one of `MAIN`.
    """
    modules = {name: value for name, value in vars(pipeline).items() if isinstance(value, nn.Module)}
    found = [name for name in MAIN if name in modules]
    return found + [name for name, module in modules.items() if name not in found and _denoises(module)]


def methods_of(module: nn.Module) -> list[str]:
    """The methods beside `forward` that are worth splitting: those of an autoencoder, `decode` and `encode`.

    A module is an autoencoder if its class has both, and both take a tensor first.
    """
    return list(HALVES) if all(_takes_tensor(getattr(type(module), name, None)) for name in HALVES) else []


def autoencoders(pipeline: Any) -> list[str]:
    """Names of the attributes of `pipeline` that are autoencoders."""
    return [name for name, value in vars(pipeline).items() if isinstance(value, nn.Module) and methods_of(value)]


def _takes_tensor(method: Any) -> bool:
    if not callable(method):
        return False
    _, *parameters = inspect.signature(method).parameters.values()  # without `self`
    return bool(parameters) and (
        parameters[0].annotation is inspect.Parameter.empty or "Tensor" in _text(parameters[0])
    )


def _text(parameter: inspect.Parameter) -> str:
    return getattr(parameter.annotation, "__name__", None) or str(parameter.annotation)


def pipelines_in(pipeline: Any) -> list[Any]:
    """The pipelines that a pipeline is made of, and itself. The former hold the same denoisers once more."""
    values = [value for value in vars(pipeline).values() if not isinstance(value, nn.Module)]
    return [*(value for value in values if hasattr(value, "scheduler") and hasattr(value, "__dict__")), pipeline]


def modules_text(pipeline: Any) -> str:
    """The modules of a pipeline and their classes, for messages."""
    modules = {name: value for name, value in vars(pipeline).items() if isinstance(value, nn.Module)}
    return ", ".join(f"{name}: {type(value).__name__}" for name, value in modules.items()) or "none"


def _denoises(module: nn.Module) -> bool:
    if BESIDE.search(type(module).__name__):
        return False
    return any(TIMESTEP.fullmatch(name) for name in inspect.signature(module.forward).parameters)


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

        set_timesteps.begin = begin
        # a bound method, so that a deep copy of the scheduler binds it to itself
        scheduler.set_timesteps = types.MethodType(set_timesteps, scheduler)
        return scheduler
