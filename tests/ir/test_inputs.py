"""Which input is the timestep, and which the sample."""

from __future__ import annotations

from dataclasses import replace

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


class Lists(nn.Module):
    def forward(self, x: list[Tensor], t: Tensor, prompts: list[Tensor], name: Tensor | None = None) -> list[Tensor]:
        return [each * t + prompt.mean() for each, prompt in zip(x, prompts, strict=True)]


def test_all_items_of_the_samples_list_move_and_what_is_not_read_is_no_conditioning() -> None:
    pictures, prompts = [torch.ones(4, 8, 8), torch.zeros(4, 8, 8)], [torch.ones(3, 5), torch.zeros(3, 5)]
    program = fxpass.capture(Lists().eval(), pictures, torch.ones(()), prompts, torch.ones(2))
    found = moving(program)
    assert found is not None
    assert program.input_paths[found.sample] == "x.0"
    assert {program.input_paths[i] for i in found.others} == {"x.1", "name"}


class Parts(nn.Module):
    def forward(self, denoiser: dict[str, Tensor], part: dict[str, Tensor], sample: Tensor) -> Tensor:
        fed = part["sample"].mean() * part["timestep"] + part["hint"].mean() + sample.mean()
        return denoiser["sample"] * denoiser["timestep"] + fed


class Conditioned(nn.Module):
    def forward(self, x: list[Tensor], t: Tensor) -> Tensor:
        return x[0] * t + x[1].mean()


def test_an_item_beside_the_sample_is_conditioning_if_the_output_is_no_such_list() -> None:
    program = fxpass.capture(Conditioned().eval(), [torch.ones(2, 4, 8, 8), torch.ones(2, 4, 8, 8)], torch.ones(()))
    found = moving(program)
    assert found is not None
    assert program.input_paths[found.sample] == "x.0"
    assert not found.others


def test_the_timestep_and_the_sample_of_another_part_move_with_the_denoisers() -> None:
    ones = torch.ones(2, 4, 8, 8)
    denoiser = {"sample": ones, "timestep": torch.ones(())}
    part = {"sample": ones[:1].clone(), "timestep": torch.ones(1), "hint": ones.clone()}
    program = fxpass.capture(Parts().eval(), denoiser, part, ones.clone())
    alone = moving(program)
    assert alone is not None
    assert not alone.others  # arguments of one model may have equal names within
    found = moving(replace(program, joined=True))
    assert found is not None
    assert program.input_paths[found.timestep] == "denoiser.timestep"
    assert program.input_paths[found.sample] == "denoiser.sample"
    assert {program.input_paths[i] for i in found.others} == {"part.sample", "part.timestep"}
