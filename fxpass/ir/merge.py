"""Exchanges in which every rank merges the partial results of all ranks: moments, sums, products, maxima, minima."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .exchange import Exchange, Payloads
from .ops import Numbers, index_tensor

ReduceOp = Literal["sum", "prod", "amax", "amin", "exponentials"]
HALF = 0.5  #: predicted moments: another rank's part changes by this share of the own change, and of its last change


@dataclass(frozen=True)
class Merged(Exchange):
    """Every rank sends its partial result to all others and merges all of them in rank order."""

    def payload_shape(self, src: int, dst: int) -> tuple[int, ...]:
        return self.shape

    def numel(self, src: int, dst: int) -> int:
        return 0 if src == dst else prod(self.shape)

    def received(self, rank: int) -> int:
        return (self.world - 1) * prod(self.shape) * self.dtype.itemsize

    @cached_property
    def broadcast(self) -> bool:
        return True

    @cached_property
    def agrees(self) -> bool:
        return True

    def pack(self, rank: int, x: Tensor) -> Payloads:
        return [None if dst == rank else x for dst in range(self.world)]


@dataclass(frozen=True)
class Moments(Merged):
    """Merge `stack([mean, M2])` of each rank's `counts[k]` elements into `stack([mean, biased variance])` of all.

    Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979), applied
    to all ranks at once, to launch few operators. Every rank merges the same parts in the same order, so that all ranks
    get the same bits.
    """

    counts: tuple[int, ...] = ()

    @cached_property
    def _shares(self) -> Numbers:
        return Numbers(np.array(self.counts, dtype=np.float64) / sum(self.counts))

    def unpack(self, rank: int, x: Tensor, received: Payloads) -> Tensor:
        return self.merged(torch.stack(in_rank_order(rank, x, received)))

    def merged(self, parts: Tensor) -> Tensor:
        """Mean and variance [2, …] of the parts of all ranks [ranks, 2, …]."""
        means, m2 = parts.unbind(1)
        share = index_tensor(self._shares, parts.device).to(parts.dtype).view(-1, *(1,) * (means.ndim - 1))
        mean = (share * means).sum(0)
        spread = m2 / sum(self.counts) + share * (means - mean).square()
        return torch.stack([mean, spread.sum(0)])

    def local(self, rank: int, x: Tensor) -> Tensor:
        """Mean and variance [2, …] of the own part alone."""
        return torch.stack([x[0], x[1] / max(1, self.counts[rank])])

    def estimated(self, rank: int, x: Tensor, sent: Tensor, now: Tensor, then: Tensor, pace: Tensor | float) -> Tensor:
        """Mean and variance [2, …] of a displaced step.

        Args:
            x: the own value of this step [2, …].
            sent: the own value of the last step [2, …].
            now, then: what the others sent at the last step and at the one before [ranks, 2, …]; `then` is `now` where
                there was no such step. The own place is not read.
            pace: the length of this step in units of the last one's, 0-dim.
        """
        if self.fresh == "corrected":
            return self._corrected(rank, x, sent, now)
        return self._predicted(rank, x, sent, now, then, pace)

    def _corrected(self, rank: int, x: Tensor, sent: Tensor, now: Tensor) -> Tensor:
        """The old means of x and x² over all ranks, plus the whole change of the rank's own ones since then.

        This is DistriFusion's estimator (Li et al., 2024), written without cancellation. If the variance comes out
        negative, the rank uses the variance of its own part.
        """
        variance = x[1] / self.counts[rank]
        mean, whole = self.merged(with_part(now, rank, sent))
        shift = x[0] - sent[0]
        moved = whole + variance - sent[1] / self.counts[rank] + 2 * shift * (sent[0] - mean)
        return torch.stack([mean + shift, torch.where(moved < 0, variance, moved)])

    def _predicted(self, rank: int, x: Tensor, sent: Tensor, now: Tensor, then: Tensor, pace: Tensor | float) -> Tensor:
        """Merge the own part with an estimate of every other part.

        The estimate moves a part by half of the own change and half of the part's last change. Means move by
        differences, squared deviations by ratios clamped to 1/2 … 2, so that no variance becomes negative. Small
        patches change differently: so half of the own change is used, for the other parts alone, where `corrected` adds
        all of it to the merged result.
        """
        share = HALF * pace
        mean = now[:, 0] + HALF * (x[0] - sent[0]) + share * (now[:, 0] - then[:, 0])
        m2 = now[:, 1] * _ratio(x[1], sent[1]) ** HALF * _ratio(now[:, 1], then[:, 1]) ** share
        return self.merged(with_part(torch.stack([mean, m2], 1), rank, x))

    def __str__(self) -> str:
        return f"moments({'x'.join(map(str, self.shape[1:]))} of {sum(self.counts)} elements)"


@dataclass(frozen=True)
class Reduce(Merged):
    """Reduce the partial results of the ranks in rank order; sums and products in float32 at least.

    `exponentials` reduces `stack([max, sum of exp(x - max)])`, which a softmax over all ranks needs. The pair is one
    value, so that a stale maximum comes with the sum that belongs to it.
    """

    op: ReduceOp = "sum"

    def unpack(self, rank: int, x: Tensor, received: Payloads) -> Tensor:
        parts = in_rank_order(rank, x, received)
        if self.op in ("sum", "prod"):
            wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
            total = parts[0].to(wide)
            for part in parts[1:]:
                total = total + part.to(wide) if self.op == "sum" else total * part.to(wide)
            return total.to(x.dtype)
        if self.op == "exponentials":
            most, sums = torch.stack(parts).unbind(1)
            largest = most.amax(0)
            return torch.stack([largest, (sums * torch.exp(most - _finite(largest))).sum(0)])
        reduce = torch.maximum if self.op == "amax" else torch.minimum
        result = parts[0]
        for part in parts[1:]:
            result = reduce(result, part)
        return result

    def local(self, rank: int, x: Tensor) -> Tensor:
        return x

    def __str__(self) -> str:
        return f"{self.op}({'x'.join(map(str, self.shape))})"


def in_rank_order(rank: int, x: Tensor, received: Payloads) -> list[Tensor]:
    """The parts of all ranks in rank order, the rank's own among them."""
    parts: list[Tensor] = []
    for src, payload in enumerate(received):
        part = x if src == rank else payload
        assert part is not None, f"rank {rank} got nothing from rank {src}"
        parts.append(part)
    return parts


def with_part(parts: Tensor, rank: int, part: Tensor) -> Tensor:
    """`parts` [ranks, …] with `part` in the place of rank `rank`."""
    place = torch.arange(len(parts), device=parts.device).view(-1, *(1,) * part.ndim)
    return torch.where(place == rank, part, parts)


def _ratio(now: Tensor, then: Tensor) -> Tensor:
    """`now / then`, clamped to 1/2 … 2; 1 if both are 0."""
    least = torch.finfo(now.dtype).tiny
    return ((now + least) / (then + least)).clamp(0.5, 2)


def _finite(x: Tensor) -> Tensor:
    """`x` with 0 in place of infinities, so that `x - _finite(x)` is never inf - inf."""
    return torch.where(x.isinf(), 0, x)
