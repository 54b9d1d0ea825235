"""The one layer that moves payloads between processes: through shared memory if all ranks see it, else by a group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ir.exchange import Payloads
from .board import Board
from .executor import Step
from .interpreter import Site, Transport
from .messages import Lane, Route
from .past import Past, copied, results_now, retained
from .process_group import GroupLane
from .shared_memory import open_lanes


class Collectives:
    """One rank's links to the others.

    Args:
        group: a `ProcessGroup` of `torch.distributed`, or one of its backends.
        urgent: another one, for what every step awaits. A group works off its messages in turn: in one group, the
            output of a step would wait for all that only the next step needs.
        blocking: the groups move host memory and their `wait` blocks the host (gloo).
    """

    def __init__(self, group: Any, urgent: Any, blocking: bool, board: Board) -> None:
        self.group = group
        self.urgent = urgent
        self.blocking = blocking
        self.board = board
        self.traffic: Counter[str] = Counter()
        self._opened = 0

    def open(self, sites: Sequence[Site], device: torch.device) -> Session:
        """Make ready for the exchanges of a plan whose values are on `device`.

        All ranks call it, for the same plans in the same order.

        Raises:
            RankError: a rank failed or did not come.
        """
        self._opened += 1
        wires = [site.wire for site in sites if site.repeated and site.wire is not site]
        routes = [Route(site, self.board.rank, self.board.world) for site in [*sites, *wires]]
        loud = [route for route in routes if not route.silent]
        lanes = self.lanes(loud, device)
        lane_of: dict[Site, Lane] = {route.site: lane for route, lane in zip(loud, lanes, strict=True)}
        ways = {route.site: Way(route, lane_of.get(route.site), self.traffic) for route in routes}
        return Session({site: Link(self.board.rank, site, ways[site], ways.get(site.wire)) for site in sites})

    def lanes(self, routes: Sequence[Route], device: torch.device) -> Sequence[Lane]:
        """What carries the messages of each route."""
        if device.type == "cpu":
            shared = open_lanes([route.site for route in routes], routes, self.board, self._opened)
            if shared is not None:
                return shared
        return [
            GroupLane(route, self.group if route.site.stale else self.urgent, device, self.blocking, self.board)
            for route in routes
        ]


class Sessions:
    """The sessions of one plan, one for each context. All ranks open and forget them alike."""

    def __init__(self, links: Collectives, sites: Sequence[Site], device: torch.device) -> None:
        self._links = links
        self._sites = sites
        self._device = device
        self._of: dict[int, Session] = {}

    def at(self, step: Step) -> Transport:
        """What performs the exchanges of a step.

        Its methods raise `RankError` if another rank failed, left, or did not answer in time.
        """
        if step.context not in self._of:
            self._of[step.context] = self._links.open(self._sites, self._device)
        session = self._of[step.context]
        return ExactStep(session) if step.exact else DisplacedStep(session, step.pace)

    def close(self) -> None:
        """Wait for what is under way."""
        for session in self._of.values():
            session.close()
        self._of.clear()


class Session:
    """The exchange nodes of one plan in one context, and what is under way between its steps."""

    def __init__(self, links: dict[Site, Link]) -> None:
        self.links = links

    def close(self) -> None:
        """Wait for what is under way. All ranks call it."""
        for link in self.links.values():
            link.drop()


class ExactStep:
    """All exchanges use what the others send now."""

    def __init__(self, session: Session) -> None:
        self.links = session.links

    def launch(self, site: Site, values: list[Tensor]) -> None:
        self.links[site].launch(values)

    def wait(self, site: Site, values: list[Tensor]) -> list[Tensor]:
        return self.links[site].wait(values)


class DisplacedStep(ExactStep):
    """Stale exchanges use what the others sent at an earlier step; `pace` is that of `Step`."""

    def __init__(self, session: Session, pace: float) -> None:
        super().__init__(session)
        self.pace = pace

    def launch(self, site: Site, values: list[Tensor]) -> None:
        if site.stale:
            self.links[site].displaced(values, self.pace)
        else:
            self.links[site].launch(values)


class Way:
    """What travels at one exchange node, and on which lane (None if nothing ever does)."""

    def __init__(self, route: Route, lane: Lane | None, traffic: Counter[str]) -> None:
        self.rank = route.rank
        self.exchanges = route.site.exchanges
        self.lane = lane
        self._sizes = route.received
        self._traffic = traffic
        self._nothing: list[Payloads] = [[None] * len(route.site.exchanges)] * route.world

    def send(self, values: list[Tensor]) -> None:
        if self.lane is None:
            return
        self.lane.send([e.pack(self.rank, x) for e, x in zip(self.exchanges, values, strict=True)])
        for role, count in self._sizes:
            self._traffic[role] += count

    @property
    def lasting(self) -> bool:
        return self.lane is None or self.lane.lasting

    def arrived(self) -> bool:
        return self.lane is None or self.lane.arrived()

    def receive(self) -> list[Payloads]:
        return self._nothing if self.lane is None else self.lane.receive()

    def done(self) -> None:
        if self.lane is not None:
            self.lane.done()


class Link:
    """One exchange node in one context: its ways, and what a stale one keeps.

    Args:
        now: what travels at exact steps.
        wire: what travels at displaced steps: the same way, but for windows and codes; None if nothing does.
    """

    def __init__(self, rank: int, site: Site, now: Way, wire: Way | None) -> None:
        self.site = site
        self.rank = rank
        self.now = now
        self.wire = wire
        self.past = Past()
        self._results: list[Tensor] | None = None  #: of a displaced step, not fetched yet
        self._underway = False  #: sent for the next step, not received yet
        self._held: Way | None = None  #: what is kept lies in the lane of this way

    def launch(self, values: list[Tensor]) -> None:
        """Send for this step."""
        self.drop()
        self.now.send(values)

    def displaced(self, values: list[Tensor], pace: float) -> None:
        """Make the results of what was sent for this step, and send for the next."""
        way = self.wire
        if self._underway:
            assert way is not None
            self._underway = False
            self._arrived(way, self.past.decoded(self.site, way.receive()))
        self._results = self.past.results(self.site, self.rank, values, pace)
        if self.site.repeated:
            assert way is not None
            self.drop()
            way.send(self.past.outgoing(self.site, self.rank, values))
            self._underway = True
            self.past.remember(self.site, values)

    def wait(self, values: list[Tensor]) -> list[Tensor]:
        """The results of this step, for the values that were launched."""
        if self._results is not None:
            results, self._results = self._results, None
            return results
        received = self.now.receive()
        results = results_now(self.site, self.rank, values, received)
        if not self.site.stale:
            self.now.done()
            return results
        self._arrived(self.now, retained(self.site, self.rank, received))
        self.past.remember(self.site, values)
        self.past.all_known(self.site, self.rank, values)
        return results

    def _arrived(self, way: Way, received: list[Payloads]) -> None:
        """Keep the payloads: in the way's lane if they are used once more, else as copies, unless they last."""
        if (self.site.forecast or (self.site.coded and way is self.now)) and not way.lasting:
            received = copied(received)
        self.past.arrived(self.site, received)
        if self.site.forecast or self.site.coded or (self.site.steady is not self.site and way is self.now):
            way.done()
        else:
            self._held = way

    def drop(self) -> None:
        """Give up what is kept of earlier steps."""
        if self._underway:
            assert self.wire is not None
            self._arrived(self.wire, self.past.decoded(self.site, self.wire.receive()))
        if self._held is not None:
            self._held.done()
        self._underway, self._held = False, None
