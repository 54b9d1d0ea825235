"""A 1-D UNet on waveforms: strided convolutions, dilated residual blocks, snakes, gates, weight norm."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


class Snake(nn.Module):
    """x + sin(a x)^2 / a, with a learned a per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.reshape(shape[0], shape[1], -1)
        x = x + (self.alpha + 1e-9).reciprocal() * torch.sin(self.alpha * x).pow(2)
        return x.reshape(shape)


def conv(inside: int, out: int, kernel: int, **options: Any) -> nn.Module:
    return weight_norm(nn.Conv1d(inside, out, kernel, **options))


class ResidualUnit(nn.Module):
    def __init__(self, dim: int, dilation: int) -> None:
        super().__init__()
        pad = 6 * dilation // 2
        self.block = nn.Sequential(
            Snake(dim), conv(dim, dim, 7, dilation=dilation, padding=pad), Snake(dim), conv(dim, dim, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        pad = (x.shape[-1] - y.shape[-1]) // 2
        if pad > 0:
            x = x[..., pad:-pad]
        return x + y


class GatedUnit(nn.Module):
    """A WaveNet's residual block with reflected borders."""

    def __init__(self, dim: int, cond: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.norm = nn.GroupNorm(1, dim)
        self.conv = nn.Conv1d(dim, dim * 2, 3, dilation=dilation)
        self.film = nn.Linear(cond, dim * 2)
        self.out = nn.Conv1d(dim, dim, 1)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        h = F.pad(self.norm(x), (self.dilation, self.dilation), mode="reflect")
        h = self.conv(h) + self.film(cond)[:, :, None]
        return (x + self.out(F.glu(h, dim=1))) / math.sqrt(2)


class Down(nn.Module):
    def __init__(self, inside: int, out: int, stride: int, cond: int) -> None:
        super().__init__()
        self.units = nn.Sequential(*(ResidualUnit(inside, d) for d in (1, 3)))
        self.act = Snake(inside)
        self.down = conv(inside, out, 2 * stride, stride=stride, padding=math.ceil(stride / 2))
        self.gate = GatedUnit(out, cond, 2)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        return self.gate(self.down(self.act(self.units(x))), cond)


class Up(nn.Module):
    def __init__(self, inside: int, out: int, stride: int, cond: int) -> None:
        super().__init__()
        self.gate = GatedUnit(inside, cond, 1)
        self.act = Snake(inside)
        pad = math.ceil(stride / 2)
        self.up = weight_norm(
            nn.ConvTranspose1d(inside, out, 2 * stride, stride, padding=pad, output_padding=stride % 2)
        )
        self.units = nn.Sequential(*(ResidualUnit(out, d) for d in (1, 3)))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        return self.units(self.up(self.act(self.gate(x, cond))))


class AudioUNet(nn.Module):
    """`forward(audio, t, embedding=None, length=None, mode="wave")`: [B, 2, T] -> a tuple (wave, loudness)."""

    def __init__(self, dim: int = 8, strides: tuple[int, ...] = (2, 4), cond: int = 12) -> None:
        super().__init__()
        self.cond, self.factor = cond, math.prod(strides)
        widths = [dim * 2**i for i in range(len(strides) + 1)]
        pairs = list(pairwise(widths))
        self.first = conv(2, dim, 7, padding=3)
        self.downs = nn.ModuleList([Down(a, b, s, cond) for (a, b), s in zip(pairs, strides, strict=True)])
        self.middle = GatedUnit(widths[-1], cond, 4)
        self.ups = nn.ModuleList([Up(2 * b, a, s, cond) for (a, b), s in zip(pairs, strides, strict=True)][::-1])
        self.last = nn.Sequential(Snake(dim), conv(dim, 2, 7, padding=3), nn.Tanh())

    def forward(
        self,
        audio: Tensor,
        t: Tensor,
        embedding: Tensor | None = None,
        length: int | None = None,
        mode: str = "wave",
    ) -> tuple[Tensor, Tensor] | tuple[Tensor]:
        size = audio.shape[-1]
        x = F.pad(audio, (0, -size % self.factor))
        freqs = torch.exp(torch.linspace(0, 4, self.cond // 2, device=audio.device))
        cond = torch.cat([(t[:, None] * freqs).sin(), (t[:, None] * freqs).cos()], dim=1)
        if embedding is not None:
            cond = cond + embedding
        x = self.first(x)
        skips: list[Tensor] = []
        for down in self.downs:
            x = down(x, cond)
            skips.append(x)
        x = self.middle(x, cond)
        for up in self.ups:
            x = up(torch.cat([x, skips.pop()], dim=1), cond)
        wave = self.last(x)[..., : size if length is None else length]
        if mode == "wave":
            return (wave,)
        return wave, F.avg_pool1d(wave.abs(), 4, 2, ceil_mode=False)
