"""One published model: its configuration, its usual size and how its pipeline calls it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import nn

from ..inputs import example_inputs


@dataclass(frozen=True)
class Entry:
    """One published model and how its pipeline calls it.

    Attributes:
        name: its name for `get` and on the command line.
        summary: one line for a listing.
        model: its class; `config` are the published values that differ from the class's defaults.
        parameters: the published number of parameters.
        height, width: the usual output size in pixels; `frames` of video (1 for images).
        batch: samples per call: 2 where the pipeline batches the two guidance branches.
        dtype: the precision it is usually run in.
        multiple: heights and widths must be multiples of this many pixels.
        scale: pixels per latent row and column; frames per latent frame (after the first) is `frame_scale`.
        wrap: makes the called module from the model, for one half of an autoencoder.
    """

    name: str
    summary: str
    model: type[Any]
    config: dict[str, Any] = field(repr=False)
    parameters: int
    height: int
    width: int
    frames: int = 1
    batch: int = 2
    dtype: torch.dtype = torch.float16
    multiple: int = 8
    scale: int = 8
    frame_scale: int = 4
    wrap: Callable[[Any], nn.Module] | None = field(default=None, repr=False)

    def build(self) -> nn.Module:
        """The module with freshly initialised parameters, in eval mode; under a fake tensor mode it takes no memory."""
        model = self.model(**self.config).eval().requires_grad_(False)
        return model if self.wrap is None else self.wrap(model)

    def latent(self, height: int, width: int, frames: int) -> tuple[int, int, int]:
        """Latent (frames, rows, columns) of an output of `frames` x `height` x `width` pixels.

        Raises:
            ValueError: the model does not take this size.
        """
        if height % self.multiple or width % self.multiple or min(height, width) < self.multiple:
            raise ValueError(f"{self.name} takes multiples of {self.multiple} pixels, not {height} x {width}")
        if self.model is diffusers.DiTTransformer2DModel and height != width:
            raise ValueError(f"{self.name} takes squares, not {height} x {width}")
        if (frames - 1) % self.frame_scale:
            raise ValueError(f"{self.name} takes {self.frame_scale} k + 1 frames, not {frames}")
        return 1 + (frames - 1) // self.frame_scale, height // self.scale, width // self.scale

    def inputs(
        self,
        module: nn.Module,
        height: int | None = None,
        width: int | None = None,
        *,
        batch: int | None = None,
        frames: int | None = None,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Keyword arguments for one call of `module`; what is not given is the entry's usual size."""
        latent_frames, rows, cols = self.latent(height or self.height, width or self.width, frames or self.frames)
        return example_inputs(module, rows, cols, batch=batch or self.batch, frames=latent_frames, seed=seed)
