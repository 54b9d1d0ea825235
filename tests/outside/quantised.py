"""Linear layers with weights of 8 bits: as modules of their own, and as a tensor subclass in a plain module."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

aten = torch.ops.aten


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers [N, K] and scales [N, 1]."""
    scale = weight.detach().abs().amax(1, keepdim=True) / 127
    return (weight.detach() / scale).round().to(torch.int8), scale


class WeightOnly(nn.Module):
    """The weight is made real numbers again at each call."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        codes, scale = quantised(linear.weight)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def dequantised(self) -> Any:
        return self.codes.to(self.scale.dtype) * self.scale  # pyright: ignore[reportCallIssue, reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantised(), self.bias)


class PerToken(WeightOnly):
    """The activations are whole numbers as well, each token with a scale of its own."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        scale = flat.abs().amax(-1, keepdim=True).clamp_min(1e-8) / 127
        codes = (flat / scale).round().clamp(-127, 127).to(torch.int8)
        weight: Any = self.codes
        y = torch._int_mm(codes, weight.t()).to(x.dtype) * scale * self.scale.t()  # pyright: ignore[reportCallIssue]
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1)


class QuantisedTensor(Tensor):
    """A weight that says it is a real one, and is whole numbers and scales: how libraries put it into plain modules."""

    codes: Tensor
    scale: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> QuantisedTensor:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, device=codes.device)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: None, size: Any, stride: Any) -> QuantisedTensor:
        return QuantisedTensor(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.detach.default:
            return cls(aten.detach.default(args[0].codes), aten.detach.default(args[0].scale))
        if func is aten.t.default:
            return cls(args[0].codes.t(), args[0].scale.t())
        plain = [arg.codes.to(arg.scale.dtype) * arg.scale if isinstance(arg, cls) else arg for arg in args]
        return func(*plain, **(kwargs or {}))


def as_subclass(linear: nn.Linear) -> nn.Module:
    linear.weight = nn.Parameter(QuantisedTensor(*quantised(linear.weight)), requires_grad=False)
    return linear


FORMS = {"module": WeightOnly, "per token": PerToken, "subclass": as_subclass}


def quantise(model: nn.Module, form: str, least: int = 16) -> nn.Module:
    """Replace the model's linear layers but for small ones."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child.in_features >= least:
                setattr(module, name, FORMS[form](child))
    return model.eval().requires_grad_(False)
