"""What a rank keeps of one exchange node from step to step (law 4)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..ir.exchange import Earlier, Payloads
from .interpreter import Site


@dataclass
class Past:
    """One rank's memory of one node in one context.

    Attributes:
        received: by source rank, the payload of each exchange, of the step that serves now.
        before: those of the step before, where values are forecast.
        sent: what this rank sent at that step, where an estimator needs it.
        known: of each exchange, what the others know of this rank's value, where they are told of changes.
        witnesses: of each exchange, the part of the own values at the last two steps on which a trend is measured.
    """

    received: list[Payloads] = field(default_factory=list)
    before: list[Payloads] | None = None
    sent: list[Tensor] = field(default_factory=list)
    known: list[Tensor | None] = field(default_factory=list)
    witnesses: list[list[Tensor]] = field(default_factory=list)

    def arrived(self, site: Site, received: list[Payloads]) -> None:
        """The payloads of another step serve from now on."""
        self.before = self.received if site.forecast and self.received else None
        self.received = received

    def decoded(self, site: Site, received: list[Payloads]) -> list[Payloads]:
        """The payloads that a displaced step's messages stand for."""
        if not site.coded:
            return received
        return [
            [
                None if new is None or old is None else each.incoming(new, old)
                for each, new, old in zip(site.exchanges, arrived, known, strict=True)
            ]
            for arrived, known in zip(received, self.received, strict=True)
        ]

    def outgoing(self, site: Site, rank: int, values: list[Tensor]) -> list[Tensor]:
        """What a displaced step sends of this rank's own values."""
        told = [each.outgoing(rank, *own) for each, *own in zip(site.exchanges, values, self.known, strict=True)]
        self.known = [known for _, known in told]
        return [value for value, _ in told]

    def all_known(self, site: Site, rank: int, values: list[Tensor]) -> None:
        """An exact step has sent these values as they are."""
        self.known = [each.known(rank, x) for each, x in zip(site.exchanges, values, strict=True)]

    def remember(self, site: Site, values: list[Tensor]) -> None:
        """What later steps need of this rank's own values."""
        self.sent = [value.clone() for value in values] if any(each.needs_sent for each in site.exchanges) else []
        if site.forecast and not self.sent:
            seen = [each.witness(x).clone() for each, x in zip(site.steady.exchanges, values, strict=True)]
            self.witnesses = [*self.witnesses[-1:], seen]

    def results(self, site: Site, rank: int, values: list[Tensor], pace: float) -> list[Tensor]:
        """A displaced step's results, from this step's own values."""
        results = []
        for i, each in enumerate(site.steady.exchanges):
            before = [part[i] for part in self.before] if self.before is not None else None
            sent = self.sent[i] if self.sent else None
            trend = None
            if pace and len(self.witnesses) == 2:
                older, old = self.witnesses
                trend = each.trend(each.witness(values[i]), old[i], older[i])
            earlier = Earlier(sent, [part[i] for part in self.received], before, pace, trend)
            results.append(each.displaced(rank, values[i], earlier))
        return results


def results_now(site: Site, rank: int, values: list[Tensor], received: list[Payloads]) -> list[Tensor]:
    """An exact step's results."""
    return [each.unpack(rank, values[i], [part[i] for part in received]) for i, each in enumerate(site.exchanges)]


def retained(site: Site, rank: int, received: list[Payloads]) -> list[Payloads]:
    """Of what an exact step received, by source, that which displaced steps read."""
    by_exchange = [e.retained(rank, [part[i] for part in received]) for i, e in enumerate(site.exchanges)]
    return [[payloads[src] for payloads in by_exchange] for src in range(len(received))]


def copied(parts: list[Payloads]) -> list[Payloads]:
    """Copies: a payload may be a view of a buffer or of a whole activation."""
    return [[None if x is None else x.clone() for x in payloads] for payloads in parts]
