"""A 3-D UNet as for medical volumes: instance norms, strided and transposed convolutions, deep supervision."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Segmentation:
    """What the network says at every resolution, finest first."""

    logits: Tensor
    deep: list[Tensor] = field(default_factory=list)
    features: tuple[Tensor, ...] | None = None
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)


class ConvBlock(nn.Module):
    def __init__(self, inside: int, out: int, stride: tuple[int, int, int] = (1, 1, 1)) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inside, out, 3, stride, padding=1, bias=True)
        self.norm = nn.InstanceNorm3d(out, eps=1e-5, affine=True)
        self.nonlin = nn.LeakyReLU(negative_slope=0.01, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.nonlin(self.norm(self.conv(x)))


class SqueezeExcite(nn.Module):
    """Channels weighed by what the whole volume holds."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool3d(1)
        self.fc = nn.Sequential(nn.Linear(width, width // 2), nn.ReLU(inplace=True), nn.Linear(width // 2, width))

    def forward(self, x: Tensor) -> Tensor:
        b, c = x.shape[:2]
        return x * self.fc(self.pool(x).view(b, c)).sigmoid().view(b, c, 1, 1, 1)


class MedicalUNet(nn.Module):
    """`forward(volume, timestep, prior=None, *, mode="deep", features=False)`, [B, C, D, H, W] -> `Segmentation`."""

    STRIDES = ((1, 1, 1), (1, 2, 2), (2, 2, 2))  # voxels are longer than wide

    def __init__(self, inside: int = 2, classes: int = 3, widths: tuple[int, ...] = (8, 12, 16)) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        self.times = nn.ModuleList([nn.Linear(1, width) for width in widths])
        previous = inside
        for width, stride in zip(widths, self.STRIDES, strict=True):
            self.stages.append(nn.Sequential(ConvBlock(previous, width, stride), ConvBlock(width, width)))
            previous = width
        self.excite = SqueezeExcite(widths[-1])
        self.ups, self.decoders, self.heads = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for low, high, stride in zip(widths[:0:-1], widths[-2::-1], self.STRIDES[:0:-1], strict=True):
            self.ups.append(nn.ConvTranspose3d(low, high, stride, stride, bias=False))
            self.decoders.append(nn.Sequential(ConvBlock(2 * high, high), ConvBlock(high, high)))
            self.heads.append(nn.Conv3d(high, classes, 1))

    def forward(
        self,
        volume: Tensor,
        timestep: Tensor,
        prior: Tensor | None = None,
        *,
        mode: str = "deep",
        features: bool = False,
    ) -> Segmentation | Tensor:
        x = volume if prior is None else torch.cat((volume, prior), 1)
        skips: list[Tensor] = []
        for stage, time in zip(self.stages, self.times, strict=True):
            x = stage(x) + time(timestep.float().view(-1, 1) / 1000)[:, :, None, None, None]
            skips.append(x)
        x = self.excite(skips.pop())
        outputs: list[Tensor] = []
        for up, decoder, head in zip(self.ups, self.decoders, self.heads, strict=True):
            x = up(x)
            skip = skips.pop()
            x = x[tuple(slice(0, size) for size in (*x.shape[:2], *skip.shape[2:]))]  # where a stride did not divide
            x = decoder(torch.cat((x, skip), dim=1))
            outputs.append(head(x))
        if mode != "deep":
            return outputs[-1]
        extra: dict[str, Any] = {"features": (x.mean((2, 3, 4)), x.amax((2, 3, 4)))} if features else {}
        return Segmentation(outputs[-1], outputs[-2::-1], **extra)
