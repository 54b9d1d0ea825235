"""The exchange that gives a value to the ranks of other stages."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

from torch import Tensor

from .exchange import Exchange, Payloads
from .layout import WHOLE, Layout


@dataclass(frozen=True)
class Transfer(Exchange):
    """The ranks of one stage send their value to those of others that have the same patch, and all have it then.

    Ranks are counted by stage, the one that sends first, then by patch. A stale transfer gives what was made at the
    last step; the ranks that send have that of this step.

    Attributes:
        patches: ranks of each stage.
        layout: of the value among these.
    """

    patches: int = 1
    layout: Layout = WHOLE

    def sends(self, rank: int) -> bool:
        """Whether a rank has the value before."""
        return rank < self.patches

    def numel(self, src: int, dst: int) -> int:
        goes = self.sends(src) and not self.sends(dst) and dst % self.patches == src
        return prod(self.payload_shape(src, dst)) if goes else 0

    def received(self, rank: int) -> int:
        return self.numel(rank % self.patches, rank) * self.dtype.itemsize

    def payload_shape(self, src: int, dst: int) -> tuple[int, ...]:
        return self.layout.local_shape(self.shape, src % self.patches)

    @cached_property
    def broadcast(self) -> bool:
        return False

    def pack(self, rank: int, x: Tensor) -> Payloads:
        return [x if dst % self.patches == rank and not self.sends(dst) else None for dst in range(self.world)]

    def __str__(self) -> str:
        return f"{self.role}({' x '.join(map(str, self.shape)) or 'a number'})"
