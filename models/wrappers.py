"""The two halves of an autoencoder as modules: `Decode` and `Encode`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Decode(nn.Module):
    """The decoder half of an autoencoder: `[B, C, h, w]` latent -> `[B, 3, H, W]` image, or video, or sound.

    `noise` replaces the random tensors that it draws, in order: as inputs they are equal on all ranks.
    `options` are the other arguments of `decode`.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent: Tensor, noise: Sequence[Tensor] = (), **options: Any) -> Tensor:
        with _Given(noise):
            decoded = self.vae.decode(latent, **options)
        return decoded if isinstance(decoded, Tensor) else decoded[0]


class Encode(nn.Module):
    """The encoder half: `[B, 3, H, W]` image, or video, or sound -> its latent.

    Where the latent is a posterior: its parameters, `[B, 2 C, h, w]` for mean and log-variance, else its mode.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, sample: Tensor, noise: Sequence[Tensor] = (), **options: Any) -> Tensor:
        with _Given(noise):
            encoded = self.vae.encode(sample, **options)
        latent = encoded if isinstance(encoded, Tensor) else encoded[0]
        if isinstance(latent, Tensor):
            return latent
        return latent.parameters if hasattr(latent, "parameters") else latent.mode()


class _Given(TorchFunctionMode):
    """Return these tensors, in order, as normal noise; draw noise when they are used up."""

    def __init__(self, noise: Sequence[Tensor]) -> None:
        super().__init__()
        self._left: Iterator[Tensor] = iter(noise)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.randn, torch.randn_like):
            given = next(self._left, None)
            if given is not None:
                return given
        return func(*args, **(kwargs or {}))
