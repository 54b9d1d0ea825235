"""Example inputs for one call of a module, derived from its `config`: what the pipeline of its class would pass.

One file per kind of model, each ending in its `MAKERS`, by class name. The catalog, the small models and folders on
disk all use `example_inputs`. Sizes are those of the latent; the number of text tokens defaults to the pipeline's.
Tensors take the device of the module's parameters and the narrowest of their dtypes (some models keep a few in
float32); under a fake tensor mode they are fake.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import library  # noqa: F401 - first: it says what to do where diffusers is missing
from . import audio, autoencoders, images_grid, images_tokens, unets, videos
from .draw import Draw, Maker, Size

__all__ = ["Draw", "Maker", "Size", "example_inputs", "takes_inputs"]

KINDS = (unets, images_grid, images_tokens, videos, audio, autoencoders)
MAKERS: dict[str, Maker] = {name: maker for kind in KINDS for name, maker in kind.MAKERS.items()}


def example_inputs(
    module: nn.Module,
    rows: int,
    cols: int,
    *,
    batch: int = 1,
    frames: int = 1,
    text: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword arguments for one call of `module` on a `rows` x `cols` latent.

    Args:
        rows, cols: height and width of the latent (for pixel-space models, of the image).
        batch: samples per call, guidance branches counted.
        frames: latent frames, for video models.
        text: text tokens; the pipeline's usual number by default.
        seed: seed of the values.

    Raises:
        LookupError: no input recipe is known for the module's class.
        ValueError: the module's configuration asks for inputs that have no recipe.
    """
    maker = next((MAKERS[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in MAKERS), None)
    if maker is None:
        raise LookupError(
            f"no example inputs are known for {type(module).__name__}; give them yourself: "
            f"known are {', '.join(sorted(MAKERS))}"
        )
    parameter = min((p for p in module.parameters() if p.is_floating_point()), key=lambda p: p.dtype.itemsize)
    draw = Draw(parameter.dtype, parameter.device, torch.Generator().manual_seed(seed))
    return maker(module, Size(rows, cols, batch, frames, text), draw)


def takes_inputs(module: nn.Module) -> bool:
    """Whether `example_inputs` has a recipe for the class of `module`."""
    return any(cls.__name__ in MAKERS for cls in type(module).__mro__)
