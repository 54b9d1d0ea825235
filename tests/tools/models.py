"""Factories of models that tests name on the command line."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.runtime.plans import block, inputs


def good() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    return block(), inputs(), {}


class Deciding(nn.Module):
    """Turns an activation into a Python number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, sample: Tensor) -> Tensor:
        y = sample * self.weight
        return y if y.sum().item() > 0 else -y


def uncapturable() -> tuple[nn.Module, dict[str, Any]]:
    return Deciding().eval(), {"sample": torch.randn(1, 4, 8, 8)}


def infinite() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    model = block()
    with torch.no_grad():
        model.conv_out.weight.fill_(float("inf"))
    return model, inputs(), {}


def faulty() -> nn.Module:
    raise KeyError("a bug of the user's")


class Unsplittable(nn.Module):
    """Calls two operators without a rule, one of them in a submodule."""

    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.lgamma(x)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.inner = self.Inner()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.inner(x.exp() + 1))
        return torch.igamma(y.exp(), x.exp()).exp()


def unsplittable() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    return Unsplittable().eval(), (torch.randn(2, 3, 8, 6),), {}


def without_inputs() -> tuple[nn.Module, dict[str, Any]]:
    """Forgets the input of its model."""
    return nn.Sequential(), {}
