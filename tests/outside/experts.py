"""A DiT whose feed-forward layers are mixtures of experts: tokens are sent by einsum, or by a loop over the experts."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Expert(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class SoftMixture(nn.Module):
    """Every token goes to every expert, weighed: no routing by values."""

    def __init__(self, dim: int, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, experts, bias=False)
        self.w1 = nn.Parameter(torch.randn(experts, dim, 2 * dim) / dim**0.5)
        self.w2 = nn.Parameter(torch.randn(experts, 2 * dim, dim) / (2 * dim) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.gate(x).softmax(-1)
        hidden = F.gelu(torch.einsum("bnd,edh->bneh", x, self.w1))
        return torch.einsum("bneh,ehd,bne->bnd", hidden, self.w2, weight)


class DispatchMixture(SoftMixture):
    """The best expert of each token, places given out in the order of the tokens, up to a capacity."""

    def __init__(self, dim: int, experts: int, capacity_factor: float = 1.25) -> None:
        super().__init__(dim, experts)
        self.experts, self.capacity_factor = experts, capacity_factor

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        capacity = int(n / self.experts * self.capacity_factor)
        gates = self.gate(x).softmax(-1)
        chosen = F.one_hot(gates.argmax(dim=-1), self.experts).to(x.dtype)  # [b, n, e]
        place = torch.cumsum(chosen, dim=1) * chosen - 1  # where the token stands in its expert's queue
        kept = (place >= 0) & (place < capacity)
        slots = F.one_hot(place.clamp(0, capacity - 1).long(), capacity).to(x.dtype) * kept.unsqueeze(-1)
        combine = slots * (gates * chosen).unsqueeze(-1)  # [b, n, e, c]
        sent = torch.einsum("bnec,bnd->ebcd", slots, x)
        hidden = F.gelu(torch.einsum("ebcd,edh->ebch", sent, self.w1))
        back = torch.einsum("ebch,ehd->ebcd", hidden, self.w2)
        return torch.einsum("bnec,ebcd->bnd", combine, back)


class LoopMixture(nn.Module):
    """The two best experts of each token, found by `where` in a loop, added up by `index_add_`."""

    def __init__(self, dim: int, experts: int, top: int = 2) -> None:
        super().__init__()
        self.top = top
        self.gate = nn.Linear(dim, experts, bias=False)
        self.experts = nn.ModuleList([Expert(dim) for _ in range(experts)])
        self.shared = Expert(dim)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = torch.topk(self.gate(flat).softmax(-1), self.top, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            rows, rank = torch.where(chosen == i)
            out.index_add_(0, rows, expert(flat[rows]) * weights[rows, rank, None])
        return (out + self.shared(flat)).view_as(x)


class Block(nn.Module):
    def __init__(self, dim: int, mixture: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.attn = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.mixture = mixture

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mixture(self.norm2(x))


class MixtureDiT(nn.Module):
    """`forward((tokens, places), timesteps, bias)`: tuples in, a tuple out; tokens are [B, N, D], places [B, N]."""

    KINDS: ClassVar = {"soft": SoftMixture, "dispatch": DispatchMixture, "loop": LoopMixture}

    def __init__(self, kind: str, dim: int = 16, depth: int = 2, experts: int = 4, places: int = 50) -> None:
        super().__init__()
        self.time = nn.Linear(1, dim)
        self.places = nn.Embedding(places, dim)
        self.blocks = nn.ModuleList([Block(dim, self.KINDS[kind](dim, experts)) for _ in range(depth)])
        self.out = nn.Linear(dim, 6)

    def forward(
        self, given: tuple[Tensor, Tensor], timesteps: Tensor, bias: tuple[float, ...] = (0.0, 1.0)
    ) -> tuple[Tensor, None]:
        x, places = given
        x = x + self.places(places) + self.time(timesteps[:, None] / 1000)[:, None] + bias[0] * bias[1]
        for block in self.blocks:
            x = block(x)
        return self.out(x), None
