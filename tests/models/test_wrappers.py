"""The halves of autoencoders: what they return, and noise as an input."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxpass.capture import CaptureError, capture
from fxpass.models.wrappers import Decode, Encode


class Noisy(nn.Module):
    """An autoencoder that draws noise twice when it decodes and once when it encodes."""

    def decode(self, z: Tensor, scale: float = 1.0) -> tuple[Tensor]:
        return (z + scale * torch.randn(z.shape) - torch.randn_like(z),)

    def encode(self, x: Tensor) -> Any:
        return (SimpleNamespace(parameters=x + torch.randn(x.shape)),)


def test_given_noise_is_used_in_order() -> None:
    z, first, second = torch.zeros(2, 3), torch.full((2, 3), 5.0), torch.full((2, 3), 2.0)
    assert torch.equal(Decode(Noisy())(z, noise=[first, second], scale=2.0), 2 * first - second)
    assert torch.equal(Encode(Noisy())(z, noise=[first]), first)


def test_given_noise_is_an_input_of_the_program() -> None:
    z, noise = torch.zeros(2, 3), [torch.ones(2, 3), torch.ones(2, 3)]
    program = capture(Decode(Noisy()), latent=z, noise=noise)
    assert len(program.inputs) == 3


def test_noise_beyond_the_given_tensors_is_refused() -> None:
    with pytest.raises(CaptureError, match="random"):
        capture(Decode(Noisy()), latent=torch.zeros(2, 3), noise=[torch.ones(2, 3)])


@pytest.mark.parametrize("given", ["tensor", "tuple", "parameters", "mode"])
def test_the_latent_is_found(given: str) -> None:
    x = torch.ones(2, 3)
    latent = {
        "tensor": x,
        "tuple": (x, None),
        "parameters": (SimpleNamespace(parameters=x),),
        "mode": (SimpleNamespace(mode=lambda: x),),
    }[given]
    vae = nn.Module()
    vae.encode = lambda sample: latent  # type: ignore[assignment]
    assert Encode(vae)(x) is x
