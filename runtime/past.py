"""What a rank keeps of one exchange node from step to step (law 4)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..ir.exchange import Payloads
from .interpreter import Site


@dataclass
class Past:
    """One rank's memory of one node in one context.

    Attributes:
        received: by source rank, the payload of each exchange, of the step that serves now.
        own: this rank's own values of that step, where an estimator needs them.
    """

    received: list[Payloads] = field(default_factory=list)
    own: list[Tensor] = field(default_factory=list)

    def keep_own(self, site: Site, values: list[Tensor]) -> None:
        self.own = list(values) if any(each.fresh == "corrected" for each in site.exchanges) else []

    def results(self, site: Site, rank: int, values: list[Tensor]) -> list[Tensor]:
        """A displaced step's results, from this step's own values."""
        own = self.own or values
        return [
            each.displaced(rank, values[i], own[i], [part[i] for part in self.received])
            for i, each in enumerate(site.exchanges)
        ]


def results_now(site: Site, rank: int, values: list[Tensor], received: list[Payloads]) -> list[Tensor]:
    """An exact step's results."""
    return [each.unpack(rank, values[i], [part[i] for part in received]) for i, each in enumerate(site.exchanges)]
