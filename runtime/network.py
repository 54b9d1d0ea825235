"""One rank's connection to the others: opens channels, by shared memory if all ranks see it, else by a group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..ir.step import ChannelSpec
from .board import Board
from .channels import Channel
from .messages import Route
from .process_group import GroupChannel
from .shared_memory import open_channels


class Network:
    """One rank's connection to the others.

    Args:
        group: a `ProcessGroup` of `torch.distributed`, or one of its backends.
        urgent: another one, for what a step awaits. A group works off its messages in turn: in one group, the output of
            a step would wait for all that only the next step needs.
        blocking: the groups move host memory and their `wait` blocks the host (gloo).
    """

    def __init__(self, group: Any, urgent: Any, blocking: bool, board: Board) -> None:
        self.group = group
        self.urgent = urgent
        self.blocking = blocking
        self.board = board
        self._opened = 0

    def open(self, specs: Sequence[ChannelSpec], device: torch.device) -> Sequence[Channel]:
        """Open channels for values on `device`. All ranks call it, for the same channels in the same order.

        Raises:
            OSError: the machine has too little memory left for the messages.
            RankError: a rank failed or did not come.
        """
        self._opened += 1
        if device.type == "cpu":
            shared = open_channels(specs, self.board, self._opened)
            if shared is not None:
                return shared
        routes = [Route(spec, self.board.rank, self.board.world) for spec in specs]
        return [GroupChannel(route, self._group_of(route.spec), device, self.blocking, self.board) for route in routes]

    def _group_of(self, spec: ChannelSpec) -> Any:
        """The group of a channel: the urgent one for what is never stale, so that displaced steps use it as well."""
        return self.urgent if spec.exchanges[0].fresh == "sync" else self.group
