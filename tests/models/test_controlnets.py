"""Pipelines with ControlNets under a stale strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from torch import Tensor

import fxpass
from fxpass.models.case import randomise_constants
from tests.tools.pipelines import write_pipeline

STEPS = 6


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    """A pipeline with two ControlNets."""
    folder = write_pipeline(tmp_path)
    base: Any = StableDiffusionPipeline.from_pretrained(folder)
    torch.manual_seed(0)
    nets = [ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(8, 8, 16)) for _ in range(2)]
    for net in nets:
        randomise_constants(net.eval())
    made: Any = StableDiffusionControlNetPipeline(**base.components, controlnet=nets, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def latents(pipe: Any, **options: Any) -> list[Tensor]:
    """The latents after each step."""
    found: list[Tensor] = []

    def keep(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        found.append(given["latents"].clone())
        return given

    hint = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(0)
    pipe(
        "a red circle", [hint, 1 - hint], num_inference_steps=STEPS, generator=generator, output_type="latent",
        callback_on_step_end=keep, **options,
    )  # fmt: skip
    return found


def test_steps_of_several_controlnets_in_guess_mode_are_displaced_and_one_may_end_early(pipe: Any) -> None:
    """It takes ten seconds: a program of three networks is captured and planned."""
    options: dict[str, Any] = {
        "guess_mode": True,
        "controlnet_conditioning_scale": [0.8, 0.5],
        "control_guidance_end": [0.5, 1.0],
    }
    expected = latents(pipe, **options)
    fxpass.parallelize(pipe, 2, executor="lockstep", strategy="displaced", warmup_steps=1)
    try:
        found, again = latents(pipe, **options), latents(pipe, **options)
        unet = fxpass.parallel(pipe.unet)
        engine = unet._engine
        assert unet.plan is fxpass.parallel(pipe.controlnet).plan
        assert not len(engine.programs)
        assert [len(joint.programs) for joint in engine.joints or ()] == [1]
        # the first step, the first with another scale, and the last one are exact
        assert engine._generations.current().displaced == STEPS - 3
    finally:
        fxpass.restore(pipe)
    assert all(map(torch.equal, found, again))
    errors = [float((one - other).norm() / other.norm()) for one, other in zip(found, expected, strict=True)]
    assert errors[0] < 1e-5 < max(errors) < 0.05
