"""A number that the model changes for the time of a call, and changes back, is no value carried to the next call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpass
from fxpass.capture import CaptureError, capture


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter, whose scale is a float in a dict, as adapters' libraries have it."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.base = nn.Linear(6, 6)
        self.down, self.up = nn.ModuleDict({"default": nn.Linear(6, 2)}), nn.ModuleDict({"default": nn.Linear(2, 6)})
        self.scaling = {"default": value}

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up["default"](self.down["default"](x)) * self.scaling["default"]


class Denoiser(nn.Module):
    """Scales all adapters by a number of the call, runs, and scales them back."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Adapted(0.7), Adapted(0.1)])

    def forward(self, x: Tensor, timestep: Any = 0, joint_attention_kwargs: dict[str, Any] | None = None) -> Tensor:
        scale = dict(joint_attention_kwargs or {}).pop("scale", 1.0)
        for block in self.blocks:
            for name in block.scaling:  # type: ignore[union-attr]
                block.scaling[name] *= scale  # type: ignore[index, operator]
        for block in self.blocks:
            x = block(x) + timestep * 0.01
        for block in self.blocks:
            for name in block.scaling:  # type: ignore[union-attr]
                block.scaling[name] /= scale  # type: ignore[index, operator]
        return x


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_scale_of_an_adapter_may_be_given_with_the_call(ranks: int) -> None:
    model = Denoiser().eval()
    module: Any = fxpass.parallelize(model, ranks, executor="lockstep")
    x = torch.randn(1, 8, 6)
    outputs = []
    for scale in (0.3, 0.3, 0.9, 0.0625, None):
        given = None if scale is None else {"scale": scale}
        found = module(x, 5, joint_attention_kwargs=given)
        with torch.no_grad():
            torch.testing.assert_close(found, model(x, 5, joint_attention_kwargs=given))
        outputs.append(found)
        for block, value in zip(model.blocks, (0.7, 0.1), strict=True):
            assert type(block.scaling["default"]) is float  # type: ignore[index]
            assert abs(block.scaling["default"] - value) < 1e-15  # type: ignore[index, operator]
    assert torch.equal(outputs[0], outputs[1])
    assert (outputs[0] - outputs[2]).abs().max() > 1e-2


def test_a_number_that_a_call_scales_and_does_not_scale_back_is_refused() -> None:
    class Model(nn.Module):
        scale = 1.0

        def forward(self, x: Tensor, factor: float) -> Tensor:
            self.scale *= factor
            return x * self.scale

    model = Model()
    with pytest.raises(CaptureError, match="its own state in place: scale"):
        capture(model, torch.randn(2, 3), 2.0)
    assert "scale" not in vars(model)


class HalfIsIgnored(nn.Module):
    """Ignores its scale if that is a tensor; 0.5 is neutral."""

    def forward(self, x: Tensor, scale: float = 0.5) -> Tensor:
        return x if isinstance(scale, Tensor) else x * (scale + 0.5)


class Zero(nn.Module):
    """Ignores its shift if that is a tensor; 0 is neutral."""

    def forward(self, x: Tensor, shift: int = 0) -> Tensor:
        return x if isinstance(shift, Tensor) else x + shift


@pytest.mark.parametrize(("model", "neutral", "other"), [(HalfIsIgnored(), 0.5, 0.25), (Zero(), 0, 3)])
def test_a_neutral_number_does_not_hide_that_its_tensor_would_be_ignored(
    model: nn.Module, neutral: float, other: float
) -> None:
    x = torch.randn(1, 3, 8, 4)
    split = fxpass.parallelize(model.eval(), 2, executor="lockstep")
    for number in (neutral, other):
        assert torch.equal(split(x, number), model(x, number))
