"""A UNet as in the first guided diffusion: scale-shift norms, residual blocks that resample, attention over one qkv."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GroupNorm32(nn.GroupNorm):
    """Normalizes in float32 whatever the dtype of the model."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as in nn.GroupNorm
        return super().forward(input.float()).type(input.dtype)


def norm(channels: int) -> nn.Module:
    return GroupNorm32(8, channels)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(0, half, dtype=torch.float32) / half).to(timesteps.device)
    args = timesteps[:, None].float() * freqs[None]
    return torch.cat([torch.cos(args), torch.sin(args)], dim=-1)


class TimestepBlock(nn.Module):
    """Whatever takes the embedding as well."""


class TimestepSequential(nn.Sequential, TimestepBlock):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, TimestepBlock) else layer(x)
        return x


class Resample(nn.Module):
    def __init__(self, up: bool) -> None:
        super().__init__()
        self.up = up

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="nearest") if self.up else F.avg_pool2d(x, 2, 2)


class ResBlock(TimestepBlock):
    """Norm, resample, convolve; the embedding scales and shifts the second norm."""

    def __init__(self, channels: int, emb: int, out: int, resample: str | None = None) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(norm(channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.updown = resample is not None
        self.h_upd = Resample(resample == "up") if resample else nn.Identity()
        self.x_upd = Resample(resample == "up") if resample else nn.Identity()
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * out))
        self.out_layers = nn.Sequential(norm(out), nn.SiLU(), nn.Dropout(0.1), nn.Conv2d(out, out, 3, padding=1))
        self.skip = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.updown:
            rest, conv = self.in_layers[:-1], self.in_layers[-1]
            h = conv(self.h_upd(rest(x)))
            x = self.x_upd(x)
        else:
            h = self.in_layers(x)
        emb_out = self.emb_layers(emb).type(h.dtype)
        while len(emb_out.shape) < len(h.shape):
            emb_out = emb_out[..., None]
        out_norm, out_rest = self.out_layers[0], self.out_layers[1:]
        scale, shift = torch.chunk(emb_out, 2, dim=1)
        return self.skip(x) + out_rest(out_norm(h) * (1 + scale) + shift)


class QKVAttentionLegacy(nn.Module):
    """Heads first, then q, k and v within each head."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, qkv: Tensor) -> Tensor:
        batch, width, length = qkv.shape
        ch = width // (3 * self.heads)
        q, k, v = qkv.reshape(batch * self.heads, ch * 3, length).split(ch, dim=1)
        scale = 1 / math.sqrt(math.sqrt(ch))
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)  # more stable with float16
        weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
        return torch.einsum("bts,bcs->bct", weight, v).reshape(batch, -1, length)


class AttentionBlock(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.qkv = nn.Conv1d(channels, channels * 3, 1)
        self.attention = QKVAttentionLegacy(heads)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, *spatial = x.shape
        x = x.reshape(b, c, -1)
        h = self.proj_out(self.attention(self.qkv(self.norm(x))))
        return (x + h).reshape(b, c, *spatial)


class ADM(nn.Module):
    """`forward(x, timesteps, y=None)`, as samplers of that time call it: positionally."""

    def __init__(
        self, channels: int = 16, mult: tuple[int, ...] = (1, 2, 2), attend: int = 2, classes: int | None = 5
    ) -> None:
        super().__init__()
        self.channels, self.classes = channels, classes
        emb = channels * 4
        self.time_embed = nn.Sequential(nn.Linear(channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        if classes is not None:
            self.label_emb = nn.Embedding(classes, emb)
        ch = channels * mult[0]
        widths = [ch]
        self.input_blocks = nn.ModuleList([TimestepSequential(nn.Conv2d(3, ch, 3, padding=1))])
        for level, m in enumerate(mult):
            layers: list[nn.Module] = [ResBlock(ch, emb, ch := m * channels)]
            if 2**level >= attend:
                layers.append(AttentionBlock(ch, 2))
            self.input_blocks.append(TimestepSequential(*layers))
            widths.append(ch)
            if level != len(mult) - 1:
                self.input_blocks.append(TimestepSequential(ResBlock(ch, emb, ch, "down")))
                widths.append(ch)
        self.middle_block = TimestepSequential(ResBlock(ch, emb, ch), AttentionBlock(ch, 2), ResBlock(ch, emb, ch))
        self.output_blocks = nn.ModuleList()
        for level, m in list(enumerate(mult))[::-1]:
            for i in range(2):
                layers = [ResBlock(ch + widths.pop(), emb, ch := m * channels)]
                if 2**level >= attend:
                    layers.append(AttentionBlock(ch, 2))
                if level and i:
                    layers.append(ResBlock(ch, emb, ch, "up"))
                self.output_blocks.append(TimestepSequential(*layers))
        self.out = nn.Sequential(norm(ch), nn.SiLU(), nn.Conv2d(ch, 6, 3, padding=1))

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        assert (y is not None) == (self.classes is not None), "must specify y if and only if class-conditional"
        hs: list[Tensor] = []
        emb = self.time_embed(timestep_embedding(timesteps, self.channels))
        if y is not None:
            assert y.shape == (x.shape[0],)
            emb = emb + self.label_emb(y)
        h = x.type(emb.dtype)
        for module in self.input_blocks:
            h = module(h, emb)
            hs.append(h)
        h = self.middle_block(h, emb)
        for module in self.output_blocks:
            h = module(torch.cat([h, hs.pop()], dim=1), emb)
        return self.out(h.type(x.dtype))
