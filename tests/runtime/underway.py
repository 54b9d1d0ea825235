"""What each rank of test_underway.py runs: `python -m tests.runtime.underway FOLDER`.

The messages go by gloo. Writes what it saw to FOLDER/<rank>.json.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fxpass.runtime.board import Board
from fxpass.runtime.distributed import DistributedExecutor
from fxpass.runtime.lockstep import LockstepExecutor
from fxpass.strategy import Strategy
from tests.runtime.plans import block, parallel, steps
from tests.runtime.ranks import RANK, WORLD, attempt

MODEL = block()


class Letter:
    """A message, and in which step it was sent and received. Its wait fails while it has not left."""

    def __init__(self, office: Office, post: Callable[[], Any]) -> None:
        self.office = office
        self.sent = office.step
        self.received: int | None = None
        self.post = post
        self.work: Any = None

    def leave(self) -> None:
        if self.work is None:
            self.work = self.post()

    def is_completed(self) -> bool:
        return self.work is not None and self.work.is_completed()

    def wait(self, *timeout: Any) -> None:
        assert self.work is not None, "a step waits for what it has sent for the next one"
        self.work.wait(*timeout)
        self.received = self.office.step


class Office:
    """A process group whose messages do not leave while it is closed."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.step = 0
        self.shut = False
        self.letters: list[Letter] = []

    def _allgather_base(self, receive: Tensor, send: Tensor) -> Letter:
        return self._post(lambda: self.group._allgather_base(receive, send))

    def alltoall_base(self, receive: Tensor, send: Tensor, receives: list[int], sends: list[int]) -> Letter:
        return self._post(lambda: self.group.alltoall_base(receive, send, receives, sends))

    def _post(self, post: Callable[[], Any]) -> Letter:
        letter = Letter(self, post)
        self.letters.append(letter)
        if not self.shut:
            letter.leave()
        return letter


class ByOffice(DistributedExecutor):
    """Its stale exchanges go by an `Office`."""

    office: Office

    def _connected(self, device: torch.device, board: Board) -> tuple[Any, Any, bool]:
        group, urgent, blocking = super()._connected(device, board)
        self.office = Office(group)
        return self.office, urgent, blocking


def overlap() -> dict[str, Any]:
    """Of six steps, two of them exact: nothing that a displaced one sends leaves before its end."""
    strategy = replace(Strategy.of("stale_gn"), warmup_steps=2)
    executor = ByOffice(WORLD, timeout=60)
    module, reference = parallel(MODEL, executor, strategy), parallel(MODEL, LockstepExecutor(WORLD), strategy)
    equal, error = [], "nothing"
    for k, call in enumerate(steps(6)):
        if k:
            executor.office.step, executor.office.shut = k, k >= 2
        found: list[Tensor] = []
        error = attempt(lambda call=call, found=found: found.append(module(*call)["sample"]))
        if not found:
            break
        equal.append(torch.equal(found[0], reference(*call)["sample"]))
        for letter in executor.office.letters:
            letter.leave()
    executor.office.step = 6
    module.close()
    flights = Counter((each.sent, each.received) for each in executor.office.letters)
    return {"equal": equal, "error": error, "flights": [[*pair, count] for pair, count in flights.items()]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    result = {
        "overlap": overlap(),
    }
    Path(sys.argv[1], f"{RANK}.json").write_text(json.dumps(result))
    dist.barrier()
