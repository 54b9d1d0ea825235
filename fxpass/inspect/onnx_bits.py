"""Bits by arithmetic: shifts, which torch's exporter takes for those of signed numbers, and the bytes of bfloat16.

ONNX cannot view a tensor as one of another type at opset 23. A bfloat16 number is 16 bits: a sign, 8 of the exponent e
and 7 of the mantissa m. Its absolute value is `(128 + m) * 2**(e - 134)`; `m * 2**-133` for e = 0; inf or nan for
e = 255. The exporter makes float32 constants of Python numbers, so no factor may be larger than those.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

INFINITE = 255  #: the exponent of inf and nan
NAN = (INFINITE << 7) | 64
STEPS = (64, 64, 64, 32, 16, 8, 4, 2, 1)  #: of an exponent: some of them, from the first on, add up to any below 256


def viewed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.view(dtype)` between bfloat16 [..., n] and uint8 [..., 2n].

    Raises:
        NotImplementedError: the types are others.
    """
    if (x.dtype, dtype) == (torch.bfloat16, torch.uint8):
        return _bytes(x)
    if (x.dtype, dtype) == (torch.uint8, torch.bfloat16):
        return _numbers(x)
    raise NotImplementedError(f"a tensor of {x.dtype} cannot be viewed as {dtype} in ONNX")


def _bytes(x: Tensor) -> Tensor:
    """The sign of 0 is lost."""
    size = x.double().abs()
    rest = size * 2.0**126  # 1 for the least number whose exponent is 1
    exponent = torch.zeros_like(rest)
    for step in STEPS:
        above = rest >= 2.0**step
        exponent = exponent + torch.where(above, step, 0)
        rest = torch.where(above, rest / 2.0**step, rest)
    word = torch.where(rest >= 1, (exponent + rest) * 128, rest * 128)
    word = torch.where(size.isinf(), INFINITE << 7, torch.where(x.isnan(), NAN, word)).long()
    word = word + torch.where(x < 0, 1 << 15, 0)
    return torch.stack([word % 256, word // 256], -1).flatten(-2).to(torch.uint8)


def _numbers(codes: Tensor) -> Tensor:
    low, high = codes.unflatten(-1, (-1, 2)).long().unbind(-1)
    exponent, mantissa = (high % 128) * 2 + low // 128, low % 128
    size = (mantissa + torch.where(exponent > 0, 128, 0)).double() * 2.0**-66 * 2.0**-67
    rest = (exponent - 1).clamp_min(0)
    for step in STEPS:
        above = rest >= step
        size = torch.where(above, size * 2.0**step, size)
        rest = rest - torch.where(above, step, 0)
    size = torch.where(exponent == INFINITE, torch.where(mantissa > 0, torch.nan, torch.inf), size)
    return torch.where(high >= 128, -size, size).to(torch.bfloat16)


def _left_shift(x: Tensor, places: Tensor | int) -> Tensor:
    return x * _power(places).to(x.dtype)


def _right_shift(x: Tensor, places: Tensor | int) -> Tensor:
    return torch.div(x.long(), _power(places), rounding_mode="floor").to(x.dtype)


def _power(places: Tensor | int) -> Tensor:
    """2 to the power of whole numbers."""
    exponent = places.long() if isinstance(places, Tensor) else torch.full((), places, dtype=torch.int64)
    return torch.pow(2, exponent)


BITS: dict[Any, Callable[..., Tensor]] = {  #: decompositions
    aten.view.dtype: viewed,
    aten.__lshift__.Scalar: _left_shift,
    aten.__lshift__.Tensor: _left_shift,
    aten.__rshift__.Scalar: _right_shift,
    aten.__rshift__.Tensor: _right_shift,
}
