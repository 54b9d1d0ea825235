"""The turn of a thread to call parallel modules: one call at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TASKS = Path("/proc/self/task")  #: Linux has a folder there for each thread of this process


class Turn:
    """A lock whose holder is known. A thread that holds it already would wait for ever: that is an error instead.

    Args:
        one_thread: all calls come from the thread of the first one, until it ends. Several processes that each run
            threads would take their turns in different orders.
    """

    def __init__(self, *, one_thread: bool = False) -> None:
        self._lock = threading.Lock()
        self.holder: int | None = None  #: the thread that has the lock
        self._one_thread = one_thread
        self._thread: threading.Thread | None = None  #: whose calls are taken
        self._number = 0  #: which the system gives that thread
        self._choosing = threading.Lock()

    @contextmanager
    def taken(self, *, ending: bool = False) -> Iterator[None]:
        """Wait for the turn, and hold it.

        Args:
            ending: it is no call; every thread may end things.

        Raises:
            RuntimeError: this thread holds it already, or another thread than this one makes the calls.
        """
        if self.holder == threading.get_ident():
            raise RuntimeError(
                "a parallel module was called, reset or closed within one of its own calls: the model, a hook on it or "
                "a signal handler uses the wrapper that fxpass.parallelize returned; use its .unwrapped model there"
            )
        if self._one_thread and not ending:
            self._check_thread()
        with self._lock:
            self.holder = threading.get_ident()
            try:
                yield
            finally:
                self.holder = None

    def _check_thread(self) -> None:
        this = threading.current_thread()
        with self._choosing:
            if self._thread is None or not self._is_alive(self._thread):
                self._thread, self._number = this, threading.get_native_id()
        if self._thread is not this:
            raise RuntimeError(
                f"the thread {this.name!r} calls a parallel module whose earlier calls came from "
                f"{self._thread.name!r}: threads of several processes (torchrun) have no common order, so all calls "
                "must come from one thread; hand the work to that thread through a queue, or start one process without "
                "torchrun (executor='spawn'), where threads take turns"
            )

    def _is_alive(self, thread: threading.Thread) -> bool:
        """Python may say so of a thread that something else has started (a server, a GUI) even after its end."""
        return thread.is_alive() and (not TASKS.exists() or (TASKS / str(self._number)).exists())
