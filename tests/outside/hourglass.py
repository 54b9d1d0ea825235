"""An hourglass transformer on pixels, channels last: neighbourhood attention outside, global attention in the middle.

Neighbourhoods are written in the three ways that need no kernel of their own: a mask over all pairs, `F.unfold`, and
`Tensor.unfold` of a padded map.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Level:
    depth: int
    width: int
    attention: str  #: "mask", "unfold", "windows" or "global"


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    dtype = reduce(torch.promote_types, (x.dtype, scale.dtype, torch.float32))
    mean_sq = torch.mean(x.to(dtype) ** 2, dim=-1, keepdim=True)
    scale = scale.to(dtype) * torch.rsqrt(mean_sq + eps)
    return x * scale.to(x.dtype)


class AdaRMSNorm(nn.Module):
    def __init__(self, width: int, cond: int) -> None:
        super().__init__()
        self.linear = nn.Linear(cond, width, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        return rms_norm(x, self.linear(cond)[:, None, None, :] + 1, 1e-6)


def scale_for_cosine_sim(q: Tensor, k: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dtype = reduce(torch.promote_types, (q.dtype, k.dtype, scale.dtype, torch.float32))
    sum_sq_q = torch.sum(q.to(dtype) ** 2, dim=-1, keepdim=True)
    sum_sq_k = torch.sum(k.to(dtype) ** 2, dim=-1, keepdim=True)
    sqrt_scale = torch.sqrt(scale.to(dtype))
    scale_q, scale_k = sqrt_scale * torch.rsqrt(sum_sq_q + eps), sqrt_scale * torch.rsqrt(sum_sq_k + eps)
    return q * scale_q.to(q.dtype), k * scale_k.to(k.dtype)


def positions(height: int, width: int) -> Tensor:
    """Centres of the pixels in [-1, 1] along the longer side, [h, w, 2]."""
    longer = max(height, width)
    h = (torch.arange(height) + 0.5) / height * 2 - 1
    w = (torch.arange(width) + 0.5) / width * 2 - 1
    return torch.stack(torch.meshgrid(h * height / longer, w * width / longer, indexing="ij"), dim=-1)


def apply_rotary(x: Tensor, theta: Tensor) -> Tensor:
    d = theta.shape[-1]
    x1, x2, x3 = x[..., :d], x[..., d : d * 2], x[..., d * 2 :]
    cos, sin = torch.cos(theta), torch.sin(theta)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin, x3), dim=-1)


class SelfAttention(nn.Module):
    def __init__(self, width: int, head: int, cond: int, kind: str, kernel: int = 3) -> None:
        super().__init__()
        self.heads, self.kind, self.kernel = width // head, kind, kernel
        self.norm = AdaRMSNorm(width, cond)
        self.qkv_proj = nn.Linear(width, width * 3, bias=False)
        self.scale = nn.Parameter(torch.full([self.heads], 10.0))
        freqs = torch.linspace(math.log(math.pi), math.log(10 * math.pi), self.heads * head // 8 + 1)[:-1].exp()
        self.register_buffer("freqs", freqs.view(head // 8, self.heads).T.contiguous())
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, pos: Tensor, cond: Tensor) -> Tensor:
        skip = x
        n, h, w, _ = x.shape
        qkv = self.qkv_proj(self.norm(x, cond))
        q, k, v = qkv.view(n, h, w, 3, self.heads, -1).permute(3, 0, 4, 1, 2, 5)  # each [n, heads, h, w, e]
        q, k = scale_for_cosine_sim(q, k, self.scale[:, None, None, None], 1e-6)
        freqs: Tensor = self.freqs  # pyright: ignore[reportAssignmentType]
        theta = torch.cat(
            (pos[..., None, 0:1] * freqs.to(pos.dtype), pos[..., None, 1:2] * freqs.to(pos.dtype)), dim=-1
        ).movedim(-2, 0)
        q, k = apply_rotary(q, theta), apply_rotary(k, theta)
        x = getattr(self, self.kind + "_attention")(q, k, v)
        return self.out_proj(x.permute(0, 2, 3, 1, 4).reshape(n, h, w, -1)) + skip

    def global_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        shape = q.shape
        q, k, v = (each.flatten(2, 3) for each in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0).reshape(shape)

    def mask_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Every pixel sees `kernel` x `kernel` pixels, at the border those nearest."""
        near = []
        for size in q.shape[2:4]:
            each = torch.arange(size, device=q.device)
            start = (each - self.kernel // 2).clamp(0, max(0, size - self.kernel))
            near.append((each[None, :] >= start[:, None]) & (each[None, :] < start[:, None] + self.kernel))
        rows, cols = near
        mask = (rows[:, None, :, None] & cols[None, :, None, :]).flatten(0, 1).flatten(1, 2)
        return self.global_attention(q, k, v, mask)

    def unfold_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """By im2col; pixels outside the map are masked."""
        n, _, h, w, _ = q.shape
        pad, taps = self.kernel // 2, self.kernel**2

        def columns(x: Tensor) -> Tensor:
            maps = x.permute(0, 1, 4, 2, 3).reshape(n, -1, h, w)
            return F.unfold(maps, self.kernel, padding=pad).view(n, -1, x.shape[-1], taps, h, w)

        inside = columns(torch.ones(n, 1, h, w, 1, dtype=q.dtype, device=q.device))[:, :, 0]
        sim = torch.einsum("nahwe,naekhw->nakhw", q, columns(k))
        sim = sim.masked_fill(inside == 0, float("-inf"))
        return torch.einsum("nakhw,naekhw->nahwe", sim.softmax(dim=2), columns(v))

    def windows_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """By sliding windows over a map whose border repeats."""
        pad = self.kernel // 2

        def windows(x: Tensor) -> Tensor:
            n, heads, h, w, e = x.shape
            x = F.pad(x.permute(0, 1, 4, 2, 3).flatten(0, 1), (pad, pad, pad, pad), mode="replicate")
            x = x.unfold(2, self.kernel, 1).unfold(3, self.kernel, 1)  # [n heads, e, h, w, k, k]
            return x.reshape(n, heads, e, h, w, -1)

        attn = torch.softmax((q.movedim(-1, 2).unsqueeze(-1) * windows(k)).sum(2), dim=-1)
        return (attn.unsqueeze(2) * windows(v)).sum(-1).movedim(2, -1)


class FeedForward(nn.Module):
    def __init__(self, width: int, cond: int) -> None:
        super().__init__()
        self.norm = AdaRMSNorm(width, cond)
        self.up_proj = nn.Linear(width, width * 4, bias=False)
        self.down_proj = nn.Linear(width * 2, width, bias=False)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        a, gate = self.up_proj(self.norm(x, cond)).chunk(2, dim=-1)
        return self.down_proj(a * F.gelu(gate)) + x


class Layer(nn.Module):
    def __init__(self, width: int, cond: int, kind: str) -> None:
        super().__init__()
        self.attn, self.ff = SelfAttention(width, 8, cond, kind), FeedForward(width, cond)

    def forward(self, x: Tensor, pos: Tensor, cond: Tensor) -> Tensor:
        return self.ff(self.attn(x, pos, cond), cond)


class TokenMerge(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width * 4, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        x = x.reshape(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5)
        return self.proj(x.reshape(n, h // 2, w // 2, -1))


class TokenSplit(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, out * 4, bias=False)
        self.fac = nn.Parameter(torch.ones(1) * 0.5)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        n, h, w, _ = x.shape
        x = self.proj(x).view(n, h, w, 2, 2, -1).permute(0, 1, 3, 2, 4, 5).reshape(n, h * 2, w * 2, -1)
        return torch.lerp(skip, x, self.fac.to(x.dtype))


class Hourglass(nn.Module):
    """`forward(x, sigma, aug_cond=None, class_cond=None, mapping_cond=None)`; x is [B, C, H, W]."""

    def __init__(self, levels: list[Level], cond: int = 24, classes: int = 3) -> None:
        super().__init__()
        self.patch_in = nn.Conv2d(3, levels[0].width, 1, bias=False)
        self.register_buffer("time_freqs", torch.randn(cond // 2))
        self.time_in = nn.Linear(cond, cond, bias=False)
        self.class_emb = nn.Embedding(classes, cond)
        self.mapping = nn.Sequential(nn.Linear(cond, cond), nn.GELU(), nn.Linear(cond, cond))
        widths = [level.width for level in levels]
        made = [
            nn.ModuleList([Layer(each.width, cond, each.attention) for _ in range(each.depth)]) for each in levels * 2
        ]
        self.down, self.mid, self.up = (
            nn.ModuleList(made[: len(levels) - 1]),
            made[len(levels) - 1],
            nn.ModuleList(made[len(levels) : -1]),
        )
        pairs = list(pairwise(widths))
        self.merges = nn.ModuleList([TokenMerge(a, b) for a, b in pairs])
        self.splits = nn.ModuleList([TokenSplit(b, a) for a, b in pairs])
        self.out_scale = nn.Parameter(torch.ones(widths[0]))
        self.patch_out = nn.Conv2d(widths[0], 3, 1, bias=False)
        nn.init.zeros_(self.patch_out.weight)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        aug_cond: Tensor | None = None,
        class_cond: Tensor | None = None,
        mapping_cond: Tensor | None = None,
    ) -> Tensor:
        x = self.patch_in(x).movedim(-3, -1)
        pos = positions(x.shape[1], x.shape[2]).to(x)
        freqs: Tensor = self.time_freqs  # pyright: ignore[reportAssignmentType]
        angles = torch.log(sigma)[:, None] / 4 * freqs * 2 * torch.pi
        cond = self.time_in(torch.cat((angles.cos(), angles.sin()), dim=-1))
        if class_cond is not None:
            cond = cond + self.class_emb(class_cond)
        cond = self.mapping(cond)
        skips: list[tuple[Tensor, Tensor]] = []
        for layers, merge in zip(self.down, self.merges, strict=True):
            for layer in layers:  # pyright: ignore[reportGeneralTypeIssues]
                x = layer(x, pos, cond)
            skips.append((x, pos))
            x = merge(x)
            _, h, w, _ = x.shape
            pos = pos.view(h, 2, w, 2, 2).mean(dim=(1, 3))
        for layer in self.mid:
            x = layer(x, pos, cond)
        for layers, split, (skip, pos) in reversed(list(zip(self.up, self.splits, skips, strict=True))):
            x = split(x, skip)
            for layer in layers:  # pyright: ignore[reportGeneralTypeIssues]
                x = layer(x, pos, cond)
        x = rms_norm(x, self.out_scale, 1e-6)
        return self.patch_out(x.movedim(-1, -3))
