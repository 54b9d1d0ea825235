"""One small model: how to build it, and inputs of any size for it.

Constant-initialised parameters (zero gates, unit norms, zero biases) are randomised, because an error that
is multiplied by zero does not show.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .inputs import Draw, Maker, Size, example_inputs


@torch.no_grad()
def randomise_constants(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give random values to every parameter whose elements are all equal; returns `module`, changed in place.

    Ones and other constants c become `c * (1 + 0.2 * randn)`; zero vectors become `0.2 * randn`, zero matrices
    and kernels `randn / sqrt(fan in)`.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        first = parameter.flatten()[0]
        if not torch.equal(parameter, first.expand_as(parameter)):
            continue
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        if first != 0:
            parameter.mul_(1 + 0.2 * noise)
        else:
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
            parameter.copy_(noise / fan_in**0.5)
    return module


@dataclass(frozen=True)
class Case:
    """One small model.

    Attributes:
        name: unique name, usable as a test id.
        model: makes the module (its initial values come from torch's global generator).
        multiple: latent heights and widths must be multiples of this.
        square: the model takes only as many columns as rows.
        frames: latent frames of a video model.
        text: text tokens; `None` where the model takes no text or fixes its length.
        extra: adds inputs to the recipe's, from `(module, size, draw)`.
        maker: makes all inputs, from `(module, size, draw)`, where `models.inputs` has no recipe for the class.
        covers: name of the class that the case stands for; by default that of the module.
    """

    name: str
    model: Callable[[], nn.Module]
    multiple: int = 1
    square: bool = False
    frames: int = 1
    text: int | None = 7
    extra: Maker | None = field(default=None, repr=False)
    maker: Maker | None = field(default=None, repr=False)
    covers: str = ""

    def build(self, seed: int = 0) -> nn.Module:
        """The module in eval mode and float32; equal seeds give equal values."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = self.model()
        return randomise_constants(module, seed).eval().requires_grad_(False)

    def inputs(
        self, rows: int = 32, batch: int = 1, seed: int = 0, *, cols: int = 16, module: nn.Module | None = None
    ) -> dict[str, Any]:
        """Keyword arguments for one call on a `rows` x `cols` latent (`rows` x `rows` if `square`).

        Args:
            module: a module that was built before, to avoid another build; only its `config` is read.

        Raises:
            ValueError: the model does not take this height or width.
        """
        cols = rows if self.square else cols
        if rows % self.multiple or cols % self.multiple:
            raise ValueError(f"{self.name} takes multiples of {self.multiple}, not {rows} x {cols}")
        module = module or self.build()
        size = Size(rows, cols, batch, self.frames, self.text)
        if self.maker is not None:
            return self.maker(module, size, _draw(seed))
        inputs = example_inputs(module, rows, cols, batch=batch, frames=self.frames, text=self.text, seed=seed)
        return inputs | self.extra(module, size, _draw(seed + 1)) if self.extra is not None else inputs


def _draw(seed: int) -> Draw:
    return Draw(torch.float32, torch.device("cpu"), torch.Generator().manual_seed(seed))


def output_tensors(output: Any) -> list[Tensor]:
    """All tensors of a model's output (a tensor, a tuple or a dataclass), in order."""
    leaves = torch.utils._pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
