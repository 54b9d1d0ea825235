"""The turn of a thread to call parallel modules: one call at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turn:
    """A lock whose holder is known. A thread that holds it already would wait for ever: that is an error instead."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.holder: int | None = None  #: the thread that has the lock

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Wait for the turn, and hold it.

        Raises:
            RuntimeError: this thread holds it already.
        """
        if self.holder == threading.get_ident():
            raise RuntimeError(
                "a parallel module was called, reset or closed within one of its own calls: the model, a hook on it or "
                "a signal handler uses the wrapper that fxpass.parallelize returned; use its .unwrapped model there"
            )
        with self._lock:
            self.holder = threading.get_ident()
            try:
                yield
            finally:
                self.holder = None
