"""Attention without pairs: features of the keys are summed over all tokens, in three ways that are in use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Conditioning:
    timestep: Tensor
    tokens: Tensor | None = None
    strength: float = 1.0
    name: str = "none"


@dataclass
class Denoised:
    sample: Tensor
    extras: dict[str, Any]


class ChannelNorm(nn.Module):
    """RMS over the channels of a map."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.g * (x.shape[1] ** 0.5)


class SoftmaxLinearAttention(nn.Module):
    """Softmax of q over features and of k over tokens, with memory keys of its own."""

    def __init__(self, dim: int, heads: int = 2, head: int = 8, memory: int = 2) -> None:
        super().__init__()
        self.heads, self.scale = heads, head**-0.5
        self.norm = ChannelNorm(dim)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, head, memory))
        self.to_qkv = nn.Conv2d(dim, heads * head * 3, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(heads * head, dim, 1), ChannelNorm(dim))

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        q, k, v = (each.reshape(b, self.heads, -1, h * w) for each in self.to_qkv(self.norm(x)).chunk(3, dim=1))
        mk, mv = (each.expand(b, -1, -1, -1) for each in self.mem_kv)
        k, v = torch.cat((mk, k), dim=-1), torch.cat((mv, v), dim=-1)
        q, k = q.softmax(dim=-2) * self.scale, k.softmax(dim=-1)
        context = torch.einsum("b h d n, b h e n -> b h d e", k, v)
        out = torch.einsum("b h d e, b h d n -> b h e n", context, q)
        return self.to_out(out.reshape(b, -1, h, w))


class KernelAttention(nn.Module):
    """elu + 1 as features, divided by the sum of the keys."""

    def __init__(self, dim: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(1, dim)
        self.to_q, self.to_kv = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim * 2, 1)
        self.to_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = self.norm(x)
        q, (k, v) = self.to_q(y), self.to_kv(y).chunk(2, 1)
        q, k, v = (each.view(b, self.heads, c // self.heads, h * w).transpose(2, 3) for each in (q, k, v))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        kv = k.transpose(-1, -2) @ v
        normalizer = 1 / (q @ k.sum(dim=2, keepdim=True).transpose(-1, -2) + 1e-6)
        return self.to_out(((q @ kv) * normalizer).transpose(2, 3).reshape(b, c, h, w))


class ReluAttention(nn.Module):
    """ReLU features; a row of ones beside v counts the keys. Several scales by depthwise convolution."""

    def __init__(self, dim: int, heads: int = 2) -> None:
        super().__init__()
        self.head = dim // heads
        self.to_qkv = nn.Conv2d(dim, dim * 3, 1, bias=False)
        self.scales = nn.ModuleList([nn.Conv2d(dim * 3, dim * 3, k, padding=k // 2, groups=dim * 3) for k in (3, 5)])
        self.to_out = nn.Conv2d(dim * 3, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        qkv = self.to_qkv(x)
        qkv = torch.cat([qkv, *(scale(qkv) for scale in self.scales)], dim=1)
        q, k, v = qkv.float().view(b, -1, 3 * self.head, h * w).chunk(3, dim=2)
        q, k = F.relu(q), F.relu(k)
        v = F.pad(v, (0, 0, 0, 1), mode="constant", value=1.0)
        out = torch.matmul(torch.matmul(v, k.transpose(-1, -2)), q)
        out = out[:, :, :-1] / (out[:, :, -1:] + 1e-15)
        return self.to_out(out.reshape(b, -1, h, w).type_as(x))


class CrossLinearAttention(nn.Module):
    """The picture asks, a few tokens answer; the tokens then look at the picture."""

    def __init__(self, dim: int, tokens: int) -> None:
        super().__init__()
        self.to_k, self.to_v, self.back = nn.Linear(tokens, dim), nn.Linear(tokens, dim), nn.Linear(dim, tokens)

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        q = x.flatten(2).mT
        k, v = self.to_k(tokens).softmax(1), self.to_v(tokens)
        out = q.softmax(-1) @ torch.einsum("bnd,bne->bde", k, v)
        weight = torch.softmax(torch.einsum("bnd,bmd->bmn", q, k), dim=-1)
        return x + out.mT.unflatten(2, x.shape[2:]), tokens + self.back(weight @ q)


class LinearDenoiser(nn.Module):
    """`forward(sample, cond: Conditioning, return_maps=False)` -> `Denoised`."""

    def __init__(self, dim: int = 16, tokens: int = 6) -> None:
        super().__init__()
        self.init_conv = nn.Conv2d(3, dim, 7, padding=3, padding_mode="circular")
        self.time = nn.Sequential(nn.Linear(1, dim), nn.SiLU(), nn.Linear(dim, dim))
        kinds = (SoftmaxLinearAttention, KernelAttention, ReluAttention)
        self.attentions = nn.ModuleList([kind(dim) for kind in kinds])
        self.mixers = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), nn.Mish(), nn.Conv2d(dim, dim, 1)) for _ in kinds]
        )
        self.cross = CrossLinearAttention(dim, tokens)
        self.final = nn.Conv2d(dim, 3, 1)

    def forward(self, sample: Tensor, cond: Conditioning, return_maps: bool = False) -> Denoised:
        x = self.init_conv(sample)
        x = x + cond.strength * self.time(cond.timestep[:, None] / 1000)[..., None, None]
        maps: list[Tensor] = []
        for attention, mixer in zip(self.attentions, self.mixers, strict=True):
            x = x + attention(x)
            x = x + mixer(x)
            maps.append(x)
        extras: dict[str, Any] = {"kind": cond.name}
        if cond.tokens is not None:
            x, extras["tokens"] = self.cross(x, cond.tokens)
        if return_maps:
            extras["maps"] = tuple(maps)
        return Denoised(self.final(x), extras)
