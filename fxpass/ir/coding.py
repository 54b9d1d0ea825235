"""What changed, in few bits: how a sender tells the others of a value that they have an older version of.

A vector of changes is cut into groups of at most 64 numbers. A group becomes one step (bfloat16, 2 bytes) and `bits`
bits for each number: which of `2**bits` levels it is nearest to, evenly spaced and symmetric around 0. What rounding
leaves is part of the next change if the sender takes its changes from what the others have made of the earlier ones, as
it must (error feedback; Seide et al., "1-bit stochastic gradient descent", 2014): so errors do not add up.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 64  #: numbers that share a step, at most
OUTERMOST = {2: 0.8, 4: 1.0, 8: 1.0}  #: the last level as a share of a group's largest number, by bits per number


def encoded_size(count: int, bits: int) -> int:
    """Bytes that a vector of `count` numbers becomes."""
    groups, size = _groups(count, bits)
    return groups * (size * bits // 8 + torch.bfloat16.itemsize)


def encode(change: Tensor, bits: int) -> Tensor:
    """Codes of the vectors along the last dim: [..., count] -> uint8 [..., encoded_size(count, bits)]."""
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
    """The changes that codes stand for: uint8 [..., encoded_size(count, bits)] -> float32 [..., count]."""
    groups, size = _groups(count, bits)
    packed, step = codes.split([groups * size * bits // 8, groups * torch.bfloat16.itemsize], -1)
    places = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    levels = (packed.unsqueeze(-1) >> places).bitwise_and_(2**bits - 1).flatten(-2).unflatten(-1, (groups, size))
    scale = _viewed(step, torch.bfloat16).float().unsqueeze(-1)
    return levels.float().sub_(2 ** (bits - 1) - 0.5).mul_(scale).flatten(-2)[..., :count]


def _viewed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of `x` as another dtype. A copy, since `x` may begin at an odd byte, or have any strides."""
    return x.clone(memory_format=torch.contiguous_format).view(dtype)


def _groups(count: int, bits: int) -> tuple[int, int]:
    """How many groups a vector has, and the size of each: whole bytes."""
    groups = -(-count // GROUP)
    whole = 8 // bits
    return groups, -(-count // (groups * whole)) * whole
