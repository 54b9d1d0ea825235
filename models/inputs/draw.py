"""The size of an example, and random tensors drawn from one generator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily


@dataclass(frozen=True)
class Size:
    """The size of one example: latent `rows` x `cols`, latent `frames` of a video, `batch`, and `text` tokens."""

    rows: int
    cols: int
    batch: int = 1
    frames: int = 1
    text: int | None = None

    def tokens(self, usual: int) -> int:
        return usual if self.text is None else self.text


@dataclass(frozen=True)
class Draw:
    """Draw tensors of one dtype on one device from one generator."""

    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float32)
        return drawn.to(device=self.device, dtype=self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator).to(self.device)

    def full(self, value: float, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.full(shape, value, dtype=dtype or self.dtype, device=self.device)

    def known(self, value: float, *shape: int) -> Tensor:
        """`full`, but never fake: the control flow of models depends on these values."""
        with unset_fake_temporarily():
            return self.full(value, *shape)

    def lengths(self, batch: int, length: int) -> list[int]:
        """Number of valid tokens of each sample, of `length`."""
        return [max(1, length - length // 4 - b) for b in range(batch)]

    def mask(self, batch: int, length: int, dtype: torch.dtype | None = None) -> Tensor:
        """`[B, T]`, one where a text token is valid: sample b has b fewer than three quarters.

        Never fake: models select by masks, so shapes depend on their values.
        """
        with unset_fake_temporarily():
            real = torch.tensor(self.lengths(batch, length))
            keep = torch.arange(length)[None, :] < real[:, None]
            return keep.to(device=self.device, dtype=dtype or self.dtype)


Maker = Callable[[Any, Size, Draw], dict[str, Any]]
