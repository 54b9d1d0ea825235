"""The one layer that moves payloads between processes: through shared memory if all ranks see it, else by a group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .board import Board
from .interpreter import Site
from .messages import Lane, Route
from .process_group import GroupLane
from .shared_memory import open_lanes


class Collectives:
    """The exchanges of one rank.

    Args:
        group: a `ProcessGroup` of `torch.distributed`, or one of its backends.
        blocking: the group moves host memory and its `wait` blocks the host (gloo).
    """

    def __init__(self, group: Any, blocking: bool, board: Board) -> None:
        self.group = group
        self.blocking = blocking
        self.board = board
        self.traffic: Counter[str] = Counter()
        self._lanes: dict[Site, Lane | None] = {}
        self._routes: dict[Site, Route] = {}
        self._opened = 0

    def open(self, sites: Sequence[Site], device: torch.device) -> None:
        """Make ready for a plan whose values are on `device`. All ranks call it, for the same plans in the same order.

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
        self._lanes |= dict.fromkeys(sites) | {route.site: lane for route, lane in zip(loud, lanes, strict=True)}
        self._routes |= {route.site: route for route in routes}

    def exchange(self, site: Site, values: list[Tensor]) -> None:
        """Replace the content of `values` by the results of the exchanges of `site`.

        Raises:
            RankError: another rank failed, left, or did not answer in time.
        """
        rank, lane = self.board.rank, self._lanes[site]
        if lane is None:
            received = [[None] * len(values)] * self.board.world
        else:
            lane.send([e.pack(rank, x) for e, x in zip(site.exchanges, values, strict=True)])
            received = lane.receive()
        for i, exchange in enumerate(site.exchanges):
            values[i] = exchange.unpack(rank, values[i], [part[i] for part in received])
        if lane is not None:
            lane.done()
        for role, count in self._routes[site].received:
            self.traffic[role] += count

    def forget(self, sites: Sequence[Site]) -> None:
        """Drop what is kept for the nodes of a plan that is released."""
        for site in sites:
            self._lanes.pop(site, None)
            self._routes.pop(site, None)
