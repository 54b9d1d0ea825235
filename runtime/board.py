"""The board: a key-value store beside the collectives, where a failing rank leaves its error for the others."""

from __future__ import annotations

import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from typing import TypeVar

from torch.distributed import Store

from . import processes
from .errors import RankError

T = TypeVar("T")
POLL = 1.0  #: seconds between two reads of the board during a wait
GRACE = 2.0  #: seconds that a rank which lost a peer waits for that peer's error message
STOPPED = 3  #: looks, one every `POLL` seconds, at a stopped process before its rank counts as failed


class Board:
    """One rank's view of the board. Keys are per call, so that a failed call does not spoil the next."""

    def __init__(self, store: Store, rank: int, world: int, timeout: float) -> None:
        self.store = store
        self.rank = rank
        self.world = world
        self.timeout = timeout
        self.call = 0
        self.meetings = 0  #: calls so far that rank 0 alone runs; ranks meet before each (`first_rank.py`)
        self.check_more: Callable[[], None] | None = None  #: called in each wait; raises if the wait is in vain
        self._place = ""  #: where this rank waits for all others
        self._place_said = ""  #: what the others can read of it
        self._apart: dict[int, tuple[str, str]] = {}  #: of each other rank at the last look: its place and this one's
        self._cards: dict[int, str] = {}  #: the processes of the other ranks, as far as they are known
        self._looked = 0.0  #: when they were looked at
        self._stopped: Counter[int] = Counter()  #: for how many looks in a row a rank's process has been stopped
        self.set(f"process/{rank}", processes.card())

    def publish(self, error: BaseException) -> None:
        """Leave the error of this rank for the others; the first one in a call is kept."""
        text = "".join(traceback.format_exception(error)).strip()
        try:
            self.store.compare_set(f"error/{self.call}", "", f"{self.rank} {text}")
        except Exception:  # the process that keeps the store has ended, and all others notice that
            return

    def check(self) -> None:
        """Called in each wait.

        Raises:
            RankError: another rank has failed in this call, waits at another place, has left, or its process, on this
                machine, has ended or is stopped.
        """
        self._check_messages()
        if time.monotonic() - self._looked >= 0.9 * POLL:  # callers come every POLL seconds, more or less
            self._looked = time.monotonic()
            self._look()

    def _check_messages(self) -> None:
        if self.check_more:
            self.check_more()
        key = f"error/{self.call}"
        if self._has(key):
            rank, _, message = self._get(key).decode().partition(" ")
            if int(rank) != self.rank:
                raise RankError(int(rank), message)

    @contextmanager
    def meeting(self, place: str) -> Iterator[None]:
        """In the body this rank waits for all others to come to a place, a text that is the same on all of them.

        Those that wait in the same call at another place would wait for each other in vain, until the timeout.
        """
        self._place = place
        try:
            yield
        finally:
            self._place = ""
            if self._place_said:
                self._place_said = ""
                with suppress(RankError):
                    self.set(f"place/{self.rank}", "-1")  # a read of a key that is gone would wait for it

    def close(self) -> None:
        """Say that this rank makes no further call."""
        with suppress(RankError):
            self.set(f"closed/{self.rank}", str(self.call))

    def _look(self) -> None:
        """Raises `RankError` if another rank has left or waits elsewhere, or its process has ended or is stopped."""
        if self._place and not self._place_said:  # it takes long
            self._place_said = f"{self.call} {self._place}"
            self.set(f"place/{self.rank}", self._place_said)
        for rank in range(self.world):
            if rank == self.rank:
                continue
            self._check_place(rank)
            if rank not in self._cards and self._has(f"process/{rank}"):
                self._cards[rank] = self._get(f"process/{rank}").decode()
            state = processes.state(self._cards.get(rank, ""))
            self._stopped[rank] = self._stopped[rank] + 1 if state == "stopped" else 0
            if state == "ended":
                raise self.lost("its process has ended", rank)
            if self._stopped[rank] >= STOPPED:
                advice = "its process is stopped (by SIGSTOP?); kill it, or continue it sooner"
                raise RankError(rank, advice, hangs=True)

    def _check_place(self, rank: int) -> None:
        """Raises `RankError` if this rank waits for another one in vain."""
        left = "a rank left a picture early (an exception in a callback?), or makes other calls"
        if self._has(f"closed/{rank}") and int(self._get(f"closed/{rank}")) < self.call:
            raise RankError(
                None,
                f"rank {rank} can make no further call (one has failed there, or fxpass.parallelize or fxpass.restore "
                f"was called), but rank {self.rank} makes one: {left}",
            )
        if not self._place or not self._has(f"place/{rank}"):
            return
        seen = self._get(f"place/{rank}").decode()
        call, _, place = seen.partition(" ")
        before = self._apart.pop(rank, None)
        if int(call) != self.call or place == self._place:
            return
        self._apart[rank] = seen, self._place
        if before == self._apart[rank]:  # at the first look it may be about to leave the place
            raise RankError(None, f"rank {rank} waits in {place}, but rank {self.rank} in {self._place}: {left}")

    def lost(self, error: object, rank: int | None = None) -> RankError:
        """The exception for a connection to a rank that ended with `error`: a rank's own error, if one left it."""
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline:
            try:
                self._check_messages()
            except RankError as known:
                return known
            time.sleep(0.05)
        which = "another rank" if rank is None else f"rank {rank}"
        return RankError(rank, f"rank {self.rank} lost its connection to {which}, which left no message ({error})")

    def timed_out(self, what: str) -> RankError:
        """The exception for a wait that exceeded the timeout."""
        return RankError(
            None,
            f"rank {self.rank} waited {self.timeout:g} s for {what}: another rank hangs or was never called",
            hangs=True,
        )

    def read(self, key: str, what: str) -> bytes:
        """Wait until another rank has set a key, and return its value.

        Raises:
            RankError: a rank failed, or the timeout passed.
        """
        began = looked = now = time.monotonic()
        while not self._has(key):
            time.sleep(min(0.05, (now - began) / 10))
            now = time.monotonic()
            if now - looked > POLL:
                looked = now
                self.check()
            if now - began > self.timeout:
                raise self.timed_out(what)
        return self._get(key)

    def all_gather(self, key: str, text: str, what: str) -> list[str]:
        """Set this rank's value of a key, and return those of all ranks.

        Raises:
            RankError: a rank failed or did not arrive.
        """
        self.set(f"{key}/{self.rank}", text)
        return [self.read(f"{key}/{rank}", what).decode() for rank in range(self.world)]

    def watched(self, connect: Callable[[], T]) -> T:
        """Run what blocks until all ranks do the same, in a thread, and check the board meanwhile.

        The thread is abandoned if a rank fails.

        Raises:
            RankError: a rank failed or did not arrive.
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

    def set(self, key: str, text: str) -> None:
        """Set a key for the other ranks.

        Raises:
            RankError: the process that keeps the store has ended.
        """
        with _reaching():
            self.store.set(key, text)

    def drop(self, key: str) -> None:
        """Delete a key that all ranks have read; raises as `set`."""
        with _reaching():
            self.store.delete_key(key)

    def _get(self, key: str) -> bytes:
        with _reaching():
            return self.store.get(key)

    def _has(self, key: str) -> bool:
        with _reaching():
            return self.store.check([key])


@contextmanager
def _reaching() -> Iterator[None]:
    """Raises `RankError` if the body does not reach the store."""
    try:
        yield
    except RuntimeError as error:
        why = next(iter(str(error).splitlines()), "")  # stacks of C++ follow
        raise RankError(None, f"the store of the process group has ended, with the rank that kept it ({why})") from None
