"""The one layer that moves payloads between processes: through shared memory if all ranks see it, else by a group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ir.exchange import Payloads
from .board import Board
from .executor import Step
from .interpreter import Site
from .messages import Lane, Route
from .past import Past, results_now
from .process_group import GroupLane
from .shared_memory import open_lanes


class Collectives:
    """One rank's links to the others.

    Args:
        group: a `ProcessGroup` of `torch.distributed`, or one of its backends.
        blocking: the group moves host memory and its `wait` blocks the host (gloo).
    """

    def __init__(self, group: Any, blocking: bool, board: Board) -> None:
        self.group = group
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
        routes = [Route(site, self.board.rank, self.board.world) for site in sites]
        loud = [route for route in routes if not route.silent]
        lanes: Sequence[Lane] | None = None
        if device.type == "cpu":
            lanes = open_lanes([route.site for route in loud], loud, self.board, self._opened)
        if lanes is None:
            lanes = [GroupLane(route, self.group, device, self.blocking, self.board) for route in loud]
        lane_of: dict[Site, Lane] = {route.site: lane for route, lane in zip(loud, lanes, strict=True)}
        return Session({route.site: Link(route, lane_of.get(route.site), self.traffic) for route in routes})


class Sessions:
    """The sessions of one plan, one for each context. All ranks open and forget them alike."""

    def __init__(self, links: Collectives, sites: Sequence[Site], device: torch.device) -> None:
        self._links = links
        self._sites = sites
        self._device = device
        self._of: dict[int, Session] = {}

    def exchange(self, step: Step) -> Callable[[Site, list[Tensor]], None]:
        """What answers the exchanges of a step."""
        if step.context not in self._of:
            self._of[step.context] = self._links.open(self._sites, self._device)
        session = self._of[step.context]
        return session.exact if step.exact else session.displaced

    def close(self) -> None:
        """Wait for what is under way."""
        for session in self._of.values():
            session.close()
        self._of.clear()


class Session:
    """The exchange nodes of one plan in one context, and what is under way between its steps."""

    def __init__(self, links: dict[Site, Link]) -> None:
        self.links = links

    def exact(self, site: Site, values: list[Tensor]) -> None:
        """Replace the content of `values` by the results of the exchanges of `site`, from what all ranks send now.

        Raises:
            RankError: another rank failed, left, or did not answer in time.
        """
        values[:] = self.links[site].exact(values)

    def displaced(self, site: Site, values: list[Tensor]) -> None:
        """The same, but stale exchanges use what the others sent at an earlier step.

        Raises:
            RankError: another rank failed, left, or did not answer in time.
        """
        link = self.links[site]
        values[:] = link.displaced(values) if site.stale else link.exact(values)

    def close(self) -> None:
        """Wait for what is under way. All ranks call it."""
        for link in self.links.values():
            link.drop()


class Link:
    """One exchange node in one context: its lane, and what a stale one keeps."""

    def __init__(self, route: Route, lane: Lane | None, traffic: Counter[str]) -> None:
        self.site = route.site
        self.rank = route.rank
        self.lane = lane  #: None if nothing ever travels
        self.traffic = traffic
        self.past = Past(self._nothing(route.world))
        self._sizes = route.received
        self._underway = False  #: sent for the next step, not received yet
        self._held = False  #: received for the next steps; lies in the lane

    def exact(self, values: list[Tensor]) -> list[Tensor]:
        self.drop()
        received = self.past.received
        if self.lane is not None:
            self._send(values)
            received = self.lane.receive()
        results = results_now(self.site, self.rank, values, received)
        if self.site.stale:
            self.past.received, self._held = received, True
            self.past.keep_own(self.site, values)
        elif self.lane is not None:
            self.lane.done()
        return results

    def displaced(self, values: list[Tensor]) -> list[Tensor]:
        if self._underway:
            assert self.lane is not None
            self.past.received, self._underway, self._held = self.lane.receive(), False, True
        results = self.past.results(self.site, self.rank, values)
        if self.site.repeated and self.lane is not None:
            self.drop()
            self._send(values)
            self._underway = True
            self.past.keep_own(self.site, values)
        return results

    def drop(self) -> None:
        """Give up what is kept of earlier steps."""
        if self.lane is None:
            return
        if self._underway:
            self.lane.receive()
        if self._underway or self._held:
            self.lane.done()
        self._underway = self._held = False

    def _send(self, values: list[Tensor]) -> None:
        assert self.lane is not None
        self.lane.send([e.pack(self.rank, x) for e, x in zip(self.site.exchanges, values, strict=True)])
        for role, count in self._sizes:
            self.traffic[role] += count

    def _nothing(self, world: int) -> list[Payloads]:
        return [[None] * len(self.site.exchanges)] * world
