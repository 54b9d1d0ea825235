"""Random numbers that a capture draws are given back: later calls draw the same ones as without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

from .call import Call
from .errors import CaptureError, model_line


@contextmanager
def draws_given_back(call: Call) -> Iterator[None]:
    """Restore the generators of random numbers: torch's own, and those among the arguments of a call."""
    cards = sorted({tensor.device.index for tensor in call.tensors if tensor.is_cuda})
    before = [
        (generator, generator.get_state())
        for generator in call.generators()
        if not isinstance(generator, GeneratorStandIn)
    ]
    with torch.random.fork_rng(devices=cards):
        try:
            yield
        finally:
            for generator, state in before:
                generator.set_state(state)


class GeneratorStandIn(torch.Generator):
    """A generator that the model may only pass on to a function that draws: nobody knows its state."""

    number: int


def _refusing(name: str) -> Any:
    def method(self: torch.Generator, *args: Any) -> Any:
        raise CaptureError(f"the model calls Generator.{name} at {model_line()}; pass what it needs as a tensor")

    return method


for _name in ("get_state", "set_state", "initial_seed", "seed", "manual_seed", "clone_state"):
    setattr(GeneratorStandIn, _name, _refusing(_name))


@lru_cache
def generator_stand_in(device: str, number: int) -> GeneratorStandIn:
    """The same object for the same place in each call, so that it makes no difference to the key of a call."""
    made = GeneratorStandIn(device)
    made.number = number
    return made
