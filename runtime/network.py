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
        return [
            GroupChannel(route, self.group if route.spec.late else self.urgent, device, self.blocking, self.board)
            for route in routes
        ]
