"""Modules whose forward is another method of a model: the two halves of an autoencoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Decode(nn.Module):
    """The decoder half of an image autoencoder: `[B, C, h, w]` latent -> `[B, 3, H, W]` image."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent: Tensor) -> Tensor:
        return self.vae.decode(latent).sample


class Encode(nn.Module):
    """The encoder half: `[B, 3, H, W]` image -> `[B, 2 C, h, w]`, mean and log-variance of the posterior."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, image: Tensor) -> Tensor:
        return self.vae.encode(image).latent_dist.parameters
