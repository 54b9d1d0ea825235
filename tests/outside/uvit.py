"""A U-ViT: everything is a token (time, class, patches), and long skips join shallow blocks to deep ones."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    half = dim // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(start=0, end=half, dtype=torch.float32) / half)
    args = timesteps[:, None].float() * freqs.to(timesteps.device)[None]
    embedding = torch.cat([torch.cos(args), torch.sin(args)], dim=-1)
    if dim % 2:
        embedding = torch.cat([embedding, torch.zeros_like(embedding[:, :1])], dim=-1)
    return embedding


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, mode: str) -> None:
        super().__init__()
        self.heads, self.scale, self.mode = heads, (dim // heads) ** -0.5, mode
        self.qkv = nn.Linear(dim, dim * 3, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, length, c = x.shape
        qkv = self.qkv(x)
        if self.mode == "flash":
            q, k, v = qkv.view(b, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, length, c)
        else:
            q, k, v = qkv.reshape(b, length, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
            attn = (q @ k.transpose(-2, -1)) * self.scale
            x = (attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(b, length, c)
        return self.proj(x)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, skip: bool, mode: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, mode)
        self.mlp = nn.Sequential(nn.Linear(dim, dim * 4), nn.GELU(), nn.Linear(dim * 4, dim))
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None:
            assert skip is not None
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(nn.Module):
    """`forward(x, timesteps, y=None, **extras)`; the picture's size is fixed, as its positions are learned."""

    def __init__(
        self, size: tuple[int, int], patch: int = 2, dim: int = 32, depth: int = 4, heads: int = 4, classes: int = 7
    ) -> None:
        super().__init__()
        self.patch, self.dim, self.extras = patch, dim, 2 if classes else 1
        self.proj = nn.Conv2d(4, dim, kernel_size=patch, stride=patch)
        self.label_emb = nn.Embedding(classes, dim) if classes else None
        tokens = size[0] // patch * (size[1] // patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extras + tokens, dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        modes = ["flash", "math"]
        self.in_blocks = nn.ModuleList([Block(dim, heads, False, modes[i % 2]) for i in range(depth // 2)])
        self.mid_block = Block(dim, heads, False, "flash")
        self.out_blocks = nn.ModuleList([Block(dim, heads, True, modes[i % 2]) for i in range(depth // 2)])
        self.norm = nn.LayerNorm(dim)
        self.decoder_pred = nn.Linear(dim, patch**2 * 4)
        self.final_layer = nn.Conv2d(4, 4, 3, padding=1)

    def unpatchify(self, x: Tensor, height: int) -> Tensor:
        b, tokens, _ = x.shape
        h, p = height // self.patch, self.patch
        x = x.reshape(b, h, tokens // h, p, p, 4)  # h w p1 p2 c
        return torch.einsum("bhwpqc->bchpwq", x).reshape(b, 4, h * p, -1)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, **extras: Any) -> Tensor:
        height = x.shape[-2]
        x = self.proj(x).flatten(2).transpose(1, 2)
        time_token = timestep_embedding(timesteps, self.dim).unsqueeze(dim=1)
        x = torch.cat((time_token, x), dim=1)
        if y is not None and self.label_emb is not None:
            x = torch.cat((self.label_emb(y).unsqueeze(dim=1), x), dim=1)
        x = x + self.pos_embed
        skips: list[Tensor] = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        x = self.decoder_pred(self.norm(x))
        assert x.size(1) == self.pos_embed.size(1)
        return self.final_layer(self.unpatchify(x[:, self.extras :, :], height))
