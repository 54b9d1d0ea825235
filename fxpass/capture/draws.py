"""Random numbers that a capture draws are given back: later calls draw the same ones as without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .call import Call


@contextmanager
def draws_given_back(call: Call) -> Iterator[None]:
    """Restore the generators of random numbers: torch's own, and those among the arguments of a call."""
    cards = sorted({tensor.device.index for tensor in call.tensors if tensor.is_cuda})
    before = [(generator, generator.get_state()) for generator in call.generators()]
    with torch.random.fork_rng(devices=cards):
        try:
            yield
        finally:
            for generator, state in before:
                generator.set_state(state)
