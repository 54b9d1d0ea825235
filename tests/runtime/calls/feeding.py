"""A small pipeline with a part that feeds its denoiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

import fxpass
from tests.runtime.plans import Pipeline, steps

PROMPT = torch.linspace(-1, 1, 24).reshape(2, 3, 4)
HINT = torch.linspace(-1, 1, 2 * 3 * 16 * 8).reshape(2, 3, 16, 8)


class Denoiser(nn.Module):
    """It adds a residual at each of two resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.mix = nn.MultiheadAttention(8, 2, kdim=4, vdim=4, batch_first=True)
        self.key = nn.Linear(8, 8)
        self.conv_out = nn.Conv2d(8, 4, 3, padding=1)

    def forward(
        self, sample: Tensor, timestep: Tensor, prompt: Tensor, residuals: Any = None, middle: Tensor | None = None
    ) -> Tensor:
        first = self.conv_in(sample) + timestep.view(-1, 1, 1, 1)
        if residuals is not None:
            first = first + residuals[0]
        h = self.down(nn.functional.silu(first))
        if middle is not None:
            h = h + middle
        tokens = h.flatten(2).transpose(1, 2)
        tokens = tokens + nn.functional.scaled_dot_product_attention(tokens, self.key(tokens), tokens)
        tokens = tokens + self.mix(tokens, prompt, prompt, need_weights=False)[0]
        h = tokens.transpose(1, 2).reshape(h.shape)
        return self.conv_out(nn.functional.interpolate(h, scale_factor=2.0) + first)


class SmallControlNet(nn.Module):
    """Returns a list of residuals and one for the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 8, 3, padding=1)
        self.hint = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.gain = 1.0

    def forward(self, sample: Tensor, timestep: Tensor, hint: Tensor, scale: float = 1.0) -> Any:
        first = nn.functional.silu(self.conv_in(sample) + self.hint(hint) + timestep.view(-1, 1, 1, 1)) * self.gain
        return [first * scale], self.down(first) * scale


class Three(Pipeline):
    """What a pipeline with a part beside its denoiser does in a step.

    Attributes:
        between: what is done with the residuals before the denoiser gets them.
    """

    between: Callable[[Any], Any]

    def step(self, sample: Tensor, timestep: Tensor, scale: float = 1.0) -> Tensor:
        half = self.half
        fed = self.controlnet(sample[half], timestep, hint=HINT[half], scale=scale)
        residuals, middle = self.between(fed)
        return self.unet(sample, timestep, PROMPT, residuals=residuals, middle=middle)


def pipeline(between: Callable[[Any], Any] = lambda fed: fed, half: slice = slice(None)) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = Denoiser().eval(), SmallControlNet().eval()
    return Three(unet=parts[0], controlnet=parts[1], scheduler=DDIMScheduler(), between=between, half=half)


def generation(pipe: Any, count: int = 6, scales: Sequence[float] = (1.0,) * 6) -> list[Tensor]:
    """The results of the steps of a generation, each with its scale."""
    pipe.scheduler.set_timesteps(count)
    with torch.no_grad():
        return [pipe.step(*given, scale) for given, scale in zip(steps(count), scales, strict=False)]


def split(pipe: Any, world: int = 2, executor: str = "lockstep", **options: Any) -> Any:
    return fxpass.parallelize(pipe, world, executor=executor, **options)


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one + 0, other, rtol=0, atol=1e-5)


def check_workers(made: Callable[[], Any], world: int, **options: Any) -> None:
    """Split a pipeline over worker processes, with one exact step: generations must be as they are in lockstep."""
    options |= {"strategy": "displaced", "warmup_steps": 1}
    pipe = made()
    expected = generation(pipe, 3)
    split(pipe, world, executor="spawn", **options)
    try:
        found = generation(pipe, 3)
        again = generation(pipe, 3)
        assert own_programs(pipe) == (0, 0)
    finally:
        fxpass.restore(pipe)
    assert all(map(torch.equal, found, again))
    close(found, generation(split(made(), world, **options), 3))
    close(found[:1], expected[:1])


def own_programs(pipe: Any) -> tuple[int, int]:
    """How many programs of the denoiser alone, and of the part alone, were loaded."""
    unet, part = (fxpass.parallel(each)._engine.programs.all() for each in (pipe.unet, pipe.controlnet))
    return len(unet), sum(entry.planned for entry in part)


def joint_of(pipe: Any) -> Any:
    """What runs the denoiser with the part."""
    joints: Any = fxpass.parallel(pipe.unet)._engine.joints
    (joint,) = joints
    return joint


def check_generation(pipe: Any, count: int, inference: bool = False) -> list[Tensor]:
    """Split a pipeline; a generation must be as it was before, which is returned.

    Args:
        inference: generate in inference mode.
    """
    expected = generation(pipe, count)
    split(pipe)
    with torch.inference_mode(inference):
        found = generation(pipe, count)
    close(found, expected)
    return expected
