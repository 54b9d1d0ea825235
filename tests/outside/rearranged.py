"""A DiT of patterns: rearrange and einsum for everything, rotary positions in two dims, dicts in and out."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rearrange(x: Tensor, pattern: str, **sizes: int) -> Tensor:
    """The part of einops' language that models use: names, groups in parentheses, ones."""
    left, right = (_groups(side) for side in pattern.split("->"))
    for group, size in zip(left, x.shape, strict=True):
        unknown = [name for name in group if name not in sizes]
        assert len(unknown) < 2, f"{pattern}: {unknown}"
        for name in unknown:
            sizes[name] = size // prod(sizes[other] for other in group if other != name)
    flat = [name for group in left for name in group]
    order = [flat.index(name) for group in right for name in group]
    x = x.reshape([sizes[name] for name in flat]).permute(order)
    return x.reshape([prod(sizes[name] for name in group) for group in right])


def _groups(side: str) -> list[list[str]]:
    found: list[list[str]] = []
    inside = False
    for word in side.replace("(", " ( ").replace(")", " ) ").split():
        if word in "()":
            inside = word == "("
            if inside:
                found.append([])
        elif word == "1":
            found.append([])
        elif inside:
            found[-1].append(word)
        else:
            found.append([word])
    return found


def axial_rope(height: int, width: int, dim: int, device: torch.device) -> Tensor:
    """Angles of every token, [h w, dim]: the first half turns with the row, the second with the column."""
    freqs = 10000 ** -(torch.arange(0, dim // 2, 2, device=device).float() / (dim // 2))
    rows = torch.einsum("i,j->ij", torch.linspace(-1, 1, height, device=device) * 8, freqs)
    cols = torch.einsum("i,j->ij", torch.linspace(-1, 1, width, device=device) * 8, freqs)
    grid = torch.cat(torch.broadcast_tensors(rows[:, None, :], cols[None, :, :]), dim=-1)
    return torch.repeat_interleave(grid, 2, dim=-1).reshape(height * width, dim)


def rotate_half(x: Tensor) -> Tensor:
    x = rearrange(x, "b h n (d r) -> b h n d r", r=2)
    first, second = x.unbind(dim=-1)
    return rearrange(torch.stack((-second, first), dim=-1), "b h n d r -> b h n (d r)")


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    return x * angles.cos() + rotate_half(x) * angles.sin()


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(dim, dim * 2, bias=False)
        self.to_out = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, context: Tensor | None = None, angles: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        q, (k, v) = self.to_q(x), self.to_kv(x if context is None else context).chunk(2, dim=-1)
        q, k, v = (rearrange(each, "b n (h d) -> b h n d", h=self.heads) for each in (q, k, v))
        if angles is not None:
            q, k = rotated(q, angles), rotated(k, angles)
        sim = torch.einsum("b h i d, b h j d -> b h i j", q, k) * self.scale
        if mask is not None:
            sim = sim.masked_fill(~rearrange(mask, "b j -> b 1 1 j"), -torch.finfo(sim.dtype).max)
        attn = (sim - sim.amax(dim=-1, keepdim=True).detach()).softmax(dim=-1)
        out = torch.einsum("b h i j, b h j d -> b h i d", attn, v)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


class GEGLU(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, dim * 4), nn.Linear(dim * 2, dim)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.up(x).chunk(2, dim=-1)
        return self.down(x * F.gelu(gate, approximate="tanh"))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attn, self.cross, self.ff = Attention(dim, heads), Attention(dim, heads), GEGLU(dim)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.cross_norm = nn.LayerNorm(dim)
        self.to_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim * 6))

    def forward(self, x: Tensor, cond: Tensor, context: Tensor, mask: Tensor | None, angles: Tensor) -> Tensor:
        a, b, c, d, e, f = rearrange(self.to_modulation(cond), "b (s d) -> s b 1 d", s=6)
        x = x + c * self.attn(self.norm(x) * (1 + a) + b, angles=angles)
        x = x + self.cross(self.cross_norm(x), context, mask=mask)
        return x + f * self.ff(self.norm(x) * (1 + d) + e)


class RearrangedDiT(nn.Module):
    """`forward(batch: dict, guidance_scale: float = 1.0, *, prediction: str = "v")` -> `{"sample", "aux"}`."""

    def __init__(self, dim: int = 32, heads: int = 2, depth: int = 2, patch: int = 2, text: int = 12) -> None:
        super().__init__()
        self.patch, self.dim, self.heads = patch, dim, heads
        self.to_tokens = nn.Linear(3 * patch**2, dim)
        self.to_pixels = nn.Linear(dim, 3 * patch**2)
        self.to_context = nn.Linear(text, dim)
        self.to_time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.register_buffer("fourier", torch.randn(dim // 2), persistent=False)
        self.null = nn.Parameter(torch.randn(dim))
        self.blocks = nn.ModuleList([Block(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, batch: dict[str, Any], guidance_scale: float = 1.0, *, prediction: str = "v"
    ) -> dict[str, Tensor | dict[str, Tensor]]:
        image, sigma = batch["image"], batch["sigma"]
        height, width = image.shape[-2] // self.patch, image.shape[-1] // self.patch
        x = rearrange(image, "b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=self.patch, p2=self.patch)
        x = self.to_tokens(x)
        angles = torch.einsum("b,d->bd", sigma.log() / 4, self.fourier) * torch.pi
        cond = self.to_time(torch.cat((angles.sin(), angles.cos()), dim=-1)) + guidance_scale * self.null
        text, mask = batch.get("text"), batch.get("mask")
        context = x if text is None else self.to_context(text)
        rope = axial_rope(height, width, self.dim // self.heads, x.device)
        for block in self.blocks:
            x = block(x, cond, context, mask, rope)
        out = self.to_pixels(self.norm(x))
        out = rearrange(out, "b (h w) (p1 p2 c) -> b c (h p1) (w p2)", h=height, p1=self.patch, p2=self.patch)
        if prediction == "eps":
            out = image + sigma.view(-1, 1, 1, 1) * out
        return {"sample": out, "aux": {"pooled": x.mean(dim=1)}}
