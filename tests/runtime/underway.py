"""What each rank of test_underway.py runs: `python -m tests.runtime.underway FOLDER`.

The messages go by gloo. Writes what it saw to FOLDER/<rank>.json.
"""

from __future__ import annotations

import gc
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fxpass.ir.strategy import Strategy
from fxpass.runtime import distributed
from fxpass.runtime.calls.module import ParallelModule
from fxpass.runtime.distributed import DistributedExecutor
from fxpass.runtime.lockstep import LockstepExecutor
from fxpass.runtime.network import Network
from fxpass.runtime.process_group import GroupChannel
from tests.runtime.plans import block, parallel, steps, whole
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


@contextmanager
def by_office() -> Iterator[list[Office]]:
    """Stale exchanges of executors that connect in the context go by an `Office`: yields these, as they are made."""
    offices: list[Office] = []
    was = distributed.connect

    def connect(*args: Any, **kwargs: Any) -> Network:
        network = was(*args, **kwargs)
        network.group = Office(network.group)
        offices.append(network.group)
        return network

    distributed.connect = connect
    try:
        yield offices
    finally:
        distributed.connect = was


def overlap() -> dict[str, Any]:
    """Of six steps, two of them exact: nothing that a displaced one sends leaves before its end."""
    strategy = replace(Strategy.of("stale_gn"), warmup_steps=2)
    executor = DistributedExecutor(WORLD, timeout=60)
    module, reference = parallel(MODEL, executor, strategy), parallel(MODEL, LockstepExecutor(WORLD), strategy)
    equal, error = [], "nothing"
    with by_office() as offices:
        for k, call in enumerate(steps(6)):
            if k:
                offices[0].step, offices[0].shut = k, k >= 2
            found: list[Tensor] = []
            error = attempt(lambda call=call, found=found: found.append(module(*call)["sample"]))
            if not found:
                break
            equal.append(torch.equal(found[0], reference(*call)["sample"]))
            for letter in offices[0].letters:
                letter.leave()
    offices[0].step = 6
    module.close()
    flights = Counter((each.sent, each.received) for each in offices[0].letters)
    return {"equal": equal, "error": error, "flights": [[*pair, count] for pair, count in flights.items()]}


def channels() -> list[GroupChannel]:
    """All that this process has."""
    gc.collect()
    return [each for each in gc.get_objects() if type(each) is GroupChannel]


def under_way(late: bool = True) -> int:
    """On how many channels a message is; those that compare the calls' inputs always have one between calls."""
    return sum(each._work is not None for each in channels() if each.spec.exchanges[0].fresh != "sync" or not late)


def threads() -> int:
    """How many this process has; a process group has some of its own."""
    gc.collect()
    return len(os.listdir("/proc/self/task"))


class Ledger:
    """Watches for messages that are given up, while it is entered.

    Attributes:
        overwritten: how often a channel sent although it had not received what was under way.
    """

    def __enter__(self) -> Ledger:
        self.overwritten = 0
        put = GroupChannel.put
        self._was = put

        def counted(channel: GroupChannel, rank: int, packed: Any) -> None:
            work = channel._work
            put(channel, rank, packed)
            self.overwritten += work is not None and not work.is_completed()

        GroupChannel.put = counted
        return self

    def __exit__(self, *_: object) -> None:
        GroupChannel.put = self._was


def begun(module: ParallelModule, strategy: Strategy, calls: list[tuple[Tensor, Tensor]]) -> list[bool]:
    """A generation of `module` from its first step on: is that one exact, and are all as if there had been no other?"""
    found = [module(*call)["sample"] for call in calls]
    unused = parallel(MODEL, LockstepExecutor(WORLD), strategy)
    equal = [torch.equal(a, unused(*call)["sample"]) for a, call in zip(found, calls, strict=True)]
    return [torch.allclose(found[0], whole(MODEL, *calls[0]), atol=1e-5), *equal]


def leaks(name: str) -> dict[str, Any]:
    """What becomes of the messages of a generation that is broken off in the middle."""
    seen: dict[str, Any] = {}
    strategy = replace(Strategy.of(name), warmup_steps=1, cooldown_steps=0)

    def middle() -> ParallelModule:
        module = parallel(MODEL, DistributedExecutor(WORLD, timeout=60), strategy)
        for call in steps(4):
            module(*call)
        return module

    idle = threads()
    with Ledger() as ledger:
        module = middle()
        seen["before"] = under_way()
        module.reset()
        seen["reset"] = begun(module, strategy, steps(8)[4:])  # but for `reset`, these go on
        seen["risen"] = begun(module, strategy, steps(4, seed=1))
        seen["call refused"] = attempt(lambda: module(steps(1)[0][0]))  # on all ranks, before anything is sent
        seen["refused"] = begun(module, strategy, steps(8, seed=1)[4:])
        seen["between"] = under_way()
        seen["shape"] = begun(module, strategy, steps(4, rows=22, seed=2))
        seen["two shapes"] = under_way()
        seen["shape again"] = begun(module, strategy, steps(4, seed=3))
        module.close()
        seen["closed"] = [under_way(late=False), len(channels()), threads() - idle]
    seen["overwritten"] = ledger.overwritten

    for who, ranks in (("all", range(WORLD)), ("one", [1])):
        module = middle()
        seen[f"{who} raise"] = [
            raised(lambda module=module: module(*steps(5)[4]), RANK in ranks),
            attempt(lambda module=module: module(*steps(6)[5])),
        ]
        module.reset()
        seen[f"{who} raise"].append(attempt(lambda module=module: module(*steps(4, seed=1)[0])))
        seen[f"{who} raise, closed"] = [attempt(module.close), under_way(late=False), len(channels()), threads() - idle]
    with parallel(MODEL, DistributedExecutor(WORLD, timeout=60), strategy) as another:
        seen["another"] = begun(another, strategy, steps(4, seed=1))
    return seen


def raised(call: Callable[[], Any], here: bool) -> str:
    """The error of a call in which the third get of a channel raises, if that is to happen `here`."""
    gets, get = 0, GroupChannel.get

    def raising(channel: GroupChannel, rank: int, number: int) -> list[Any]:
        nonlocal gets
        gets += 1
        if here and gets == 3:
            raise ArithmeticError("only once")
        return get(channel, rank, number)

    GroupChannel.get = raising
    try:
        return attempt(call)
    finally:
        GroupChannel.get = get


def resident() -> int:
    """Bytes of memory that this process has."""
    (kilobytes,) = re.findall(r"VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(kilobytes)


def growth() -> dict[str, Any]:
    """Channels, tensors and memory, five times in 200 generations."""
    seen: dict[str, Any] = {"channels": [], "under way": [], "tensors": [], "memory": []}
    strategy = replace(Strategy.of("stale_gn"), warmup_steps=1)
    generations = [steps(3, rows=96, seed=seed) for seed in range(4)]
    with parallel(MODEL, DistributedExecutor(WORLD, timeout=60), strategy) as module:
        for k in range(200):
            if k % 2:
                module.reset()
            for call in generations[k % 4]:
                module(*call)
            if k % 40 == 39:
                seen["channels"].append(len(channels()))
                seen["under way"].append(under_way())
                seen["tensors"].append(sum(type(each) is Tensor for each in gc.get_objects()))
                seen["memory"].append(resident())
        seen["received"] = sum(module.traffic.values())
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    gc.collect()
    gc.freeze()  # what imports have made is no channel: searches leave it out
    result = {
        "overlap": overlap(),
        "leaks": {name: leaks(name) for name in ("stale_gn", "compressed")},
        "growth": growth(),
    }
    Path(sys.argv[1], f"{RANK}.json").write_text(json.dumps(result))
    dist.barrier()
