"""What runs in the middle of a forward, but not for the model, is not taken for the model's state."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor, nn

import fxpass

COLLECTIONS = 0.0


class Collects(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        gc.collect()
        return x + 1


def test_a_callback_of_the_garbage_collector_may_count() -> None:
    def count(phase: str, info: dict[str, Any]) -> None:
        global COLLECTIONS
        COLLECTIONS += 0.5

    gc.callbacks.append(count)
    try:
        module: Any = fxpass.parallelize(Collects().eval(), 2, executor="lockstep")
        with module as parallel:
            x = torch.randn(1, 8, 4)
            assert torch.equal(parallel(x), x + 1)
    finally:
        gc.callbacks.remove(count)
    assert COLLECTIONS > 0
