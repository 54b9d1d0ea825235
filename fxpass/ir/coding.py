"""Coding of changes in few bits, for receivers that have an older version of a value.

A vector of changes is cut into groups of at most 64 numbers. A group is coded as one step size (bfloat16, 2 bytes) and
`bits` bits per number: the nearest of `2**bits` evenly spaced levels, symmetric around 0.

The sender computes changes relative to the value as the receivers have decoded it. So the next change contains the
rounding error of this one, and errors do not add up (error feedback; Seide et al., "1-bit stochastic gradient descent",
2014).
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 64  #: the largest number of numbers that share a step size
OUTERMOST = {2: 0.8, 4: 1.0, 8: 1.0}  #: by bits per number: the outermost level divided by a group's largest number


def encoded_size(count: int, bits: int) -> int:
    """The number of bytes that code a vector of `count` numbers."""
    groups, size = _groups(count, bits)
    return groups * (size * bits // 8 + torch.bfloat16.itemsize)


def encode(change: Tensor, bits: int) -> Tensor:
    """Code the vectors along the last dim: [..., count] -> uint8 [..., encoded_size(count, bits)]."""
    groups, size = _groups(change.shape[-1], bits)
    x = torch.nn.functional.pad(change.float(), (0, groups * size - change.shape[-1])).unflatten(-1, (groups, size))
    half = 2 ** (bits - 1)
    step = (x.abs().amax(-1) * (OUTERMOST[bits] / (half - 0.5))).to(torch.bfloat16)
    tiny = torch.finfo(torch.float32).tiny
    # The quotient lies between -half and half: rounding to bfloat16 shrinks the step by 1/257 at most.
    levels = (x / step.float().clamp_min(tiny).unsqueeze(-1)).floor_().add_(half)
    parts = levels.to(torch.uint8).flatten(-2).unflatten(-1, (-1, 8 // bits))
    codes = parts[..., 0].clone()
    for place in range(1, 8 // bits):
        codes |= parts[..., place] << (bits * place)
    return torch.cat([codes, _viewed(step, torch.uint8)], -1)


def decode(codes: Tensor, count: int, bits: int) -> Tensor:
    """Decode to changes: uint8 [..., encoded_size(count, bits)] -> float32 [..., count]."""
    groups, size = _groups(count, bits)
    packed, step = codes.split([groups * size * bits // 8, groups * torch.bfloat16.itemsize], -1)
    places = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    levels = (packed.unsqueeze(-1) >> places).bitwise_and_(2**bits - 1).flatten(-2).unflatten(-1, (groups, size))
    scale = _viewed(step, torch.bfloat16).float().unsqueeze(-1)
    return levels.float().sub_(2 ** (bits - 1) - 0.5).mul_(scale).flatten(-2)[..., :count]


def _viewed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of `x` as another dtype. A copy, because `x` may start at an odd byte and have any strides."""
    return x.clone(memory_format=torch.contiguous_format).view(dtype)


def _groups(count: int, bits: int) -> tuple[int, int]:
    """The number of groups of a vector, and their size, whose codes fill whole bytes."""
    groups = -(-count // GROUP)
    whole = 8 // bits
    return groups, -(-count // (groups * whole)) * whole
