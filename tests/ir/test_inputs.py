"""Which input is the timestep, and which the sample."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxpass
from fxpass.ir.inputs import moving


class Model(nn.Module):
    def forward(self, prompt: Tensor, timestep: Tensor, sample: Tensor, sigma: Tensor | None = None) -> Tensor:
        scale = timestep.flatten()[0] + prompt.mean() + (0 if sigma is None else sigma.mean())
        return sample * scale


@pytest.mark.parametrize("shape", [(), (2,), (2, 3), (2, 3, 4)])
def test_a_timestep_has_at_most_a_number_for_each_frame_of_each_sample(shape: tuple[int, ...]) -> None:
    program = fxpass.capture(Model().eval(), torch.ones(2, 5), torch.ones(shape), torch.ones(2, 4, 8, 8))
    found = moving(program)
    assert (found is None) == (len(shape) == 3)
    assert found is None or program.input_paths[found.timestep] == "timestep"
    assert found is None or program.input_paths[found.sample] == "sample"


def test_a_timestep_for_each_sample_is_taken_before_one_for_each_frame() -> None:
    given = torch.ones(2, 5), torch.ones(2, 3), torch.ones(2, 4, 8, 8), torch.ones(2)
    program = fxpass.capture(Model().eval(), *given)
    found = moving(program)
    assert found is not None
    assert program.input_paths[found.timestep] == "sigma"
