"""Timelines in Chrome's trace format, for https://ui.perfetto.dev: each process has three threads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

COMPUTE, AWAITED, LATE = range(3)  #: threads of a rank
THREADS = {COMPUTE: "compute", AWAITED: "messages that the step awaits", LATE: "messages for the next step"}


class Timeline:
    """The bars of all processes. Times are in seconds since the first step began."""

    def __init__(self, names: Sequence[str]) -> None:
        self.events: list[dict[str, Any]] = []
        for rank, process in enumerate(names):
            self._name("process_name", rank, process)
            for thread, name in THREADS.items():
                self._name("thread_name", rank, name, tid=thread)

    def _name(self, what: str, rank: int, name: str, **more: int) -> None:
        self.events.append({"name": what, "ph": "M", "pid": rank, "args": {"name": name}, **more})

    def bar(
        self,
        rank: int,
        thread: int,
        name: str,
        category: str,
        began: float,
        ended: float,
        path: str = "",
        more: Mapping[str, int] | None = None,
    ) -> None:
        """Add a bar, unless it has no length.

        Args:
            category: "step", "kernel", "exchange" (it copies a message), "wait" or "message".
            path: the module that it belongs to.
            more: shown with the bar: bytes by exchange and sender.
        """
        if ended > began:
            args = ({"module": path} if path else {}) | dict(more or {})
            event = {"name": name, "cat": category, "ph": "X", "pid": rank, "tid": thread}
            self.events.append(
                event | {"ts": round(began * 1e6, 3), "dur": round((ended - began) * 1e6, 3), "args": args}
            )

    def text(self) -> str:
        """JSON."""
        return json.dumps({"traceEvents": self.events, "displayTimeUnit": "ms"}, separators=(",", ":"))
