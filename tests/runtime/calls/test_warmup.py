"""`warmup` does beforehand what first calls would do."""

from typing import Any

import pytest
import torch
from torch import Tensor

import fxpass
from fxpass.runtime import step_runner
from tests.runtime.plans import Block, block, inputs, steps, whole


@pytest.mark.parametrize("strategy", ["sync", "displaced"])
def test_after_a_warmup_no_step_of_a_generation_is_captured_or_made_anew(
    monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    module: Any = fxpass.parallelize(block(), 2, strategy=strategy, executor="lockstep")
    module.warmup(*inputs())
    monkeypatch.setattr("fxpass.runtime.calls.programs.capture_call", lambda *_: 1 / 0)
    made: list[Any] = []
    plain = step_runner.step_code
    monkeypatch.setattr(step_runner, "step_code", lambda *args, **kwargs: made.append(args) or plain(*args, **kwargs))
    exact = whole(module.unwrapped, *inputs())
    torch.testing.assert_close(module(*inputs())["sample"], exact)  # a first step: nothing is left of the warm-up
    for call in steps(8):
        module(*call)
    assert not made


def test_a_warmup_also_takes_timesteps_as_numbers() -> None:
    class Numbered(Block):
        def forward(self, sample: Tensor, timestep: float) -> Any:
            return super().forward(sample, torch.as_tensor(timestep, dtype=sample.dtype))

    module: Any = fxpass.parallelize(Numbered().eval(), 2, strategy="displaced", executor="lockstep")
    module.warmup(inputs()[0], 0.9)
    assert len(module._engine.programs) == 1
    assert module.plan.exact_steps == (4, 1)
    assert module._engine.calls == 6
