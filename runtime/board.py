"""The notice board: a key-value store beside the collectives, where a failing rank leaves word for the others."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from torch.distributed import Store

from .errors import RankError

T = TypeVar("T")
POLL = 1.0  #: seconds between two looks at the board while waiting
GRACE = 2.0  #: seconds that a rank which lost a peer waits for that peer's last words


class Board:
    """One rank's view of the board. Keys are per call, so that a failed call does not spoil the next."""

    def __init__(self, store: Store, rank: int, world: int, timeout: float) -> None:
        self.store = store
        self.rank = rank
        self.world = world
        self.timeout = timeout
        self.call = 0
        self.doubt: Callable[[], None] | None = None  #: run while a call waits; raises if it waits in vain

    def publish(self, error: BaseException) -> None:
        """Tell the others why this rank stops; the first to do so is heard."""
        text = "".join(traceback.format_exception(error)).strip()
        try:
            self.store.compare_set(f"error/{self.call}", "", f"{self.rank} {text}")
        except Exception:  # the store's host is gone: nobody is left to tell
            return

    def check(self) -> None:
        """Raises `RankError` if another rank has failed in this call, and what `doubt` raises."""
        if self.doubt:
            self.doubt()
        key = f"error/{self.call}"
        if not self._has(key):
            return
        said = self.store.get(key).decode()
        rank, _, message = said.partition(" ")
        if int(rank) != self.rank:
            raise RankError(int(rank), message)

    def lost(self, error: object) -> RankError:
        """What to raise when a collective failed with `error`: the reason that another rank left, if it left one."""
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline:
            try:
                self.check()
            except RankError as known:
                return known
            time.sleep(0.05)
        return RankError(None, f"rank {self.rank} lost its connection to another rank, which left no message ({error})")

    def overdue(self, what: str) -> RankError:
        """What to raise when the timeout has passed."""
        return RankError(
            None, f"rank {self.rank} waited {self.timeout:g} s for {what}: another rank hangs or was never called"
        )

    def read(self, key: str, what: str) -> bytes:
        """The value of a key, once another rank has set it.

        Raises `RankError` if a rank fails meanwhile or the timeout passes.
        """
        began = looked = now = time.monotonic()
        while not self._has(key):
            time.sleep(min(0.05, (now - began) / 10))
            now = time.monotonic()
            if now - looked > POLL:
                looked = now
                self.check()
            if now - began > self.timeout:
                raise self.overdue(what)
        return self.store.get(key)

    def watched(self, connect: Callable[[], T]) -> T:
        """Do what blocks until all ranks do it, and look at the board meanwhile.

        It runs in a thread, which is left behind if a rank fails.

        Raises:
            RankError: a rank failed or did not come.
        """
        made: Future[T] = Future()

        def run() -> None:
            try:
                made.set_result(connect())
            except Exception as error:
                made.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        while not wait([made], POLL).done:
            self.check()
        error = made.exception()
        if error is not None:
            raise self.lost(error) from error
        return made.result()

    def _has(self, key: str) -> bool:
        try:
            return self.store.check([key])
        except RuntimeError as error:
            raise RankError(
                None, f"the store of the process group is gone, with the rank that kept it ({error})"
            ) from None
