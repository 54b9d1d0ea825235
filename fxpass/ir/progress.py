"""What takes long says what it is doing: `with progress("capture Model") as task: …; task.say("record it")`.

Nothing is shown here. A program that wants to show it opens `watched()`, and looks at the tasks of that list from
another thread as often as it likes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass(eq=False)
class Task:
    """Something that takes long.

    Attributes:
        what: "capture Model".
        total: how many parts there are; None if that is not known.
        done: how many of them are done.
        now: what it does now; "" if there is nothing to say.
        started: by `time.monotonic()`.
    """

    what: str
    total: int | None = None
    done: int = 0
    now: str = ""
    started: float = field(default_factory=time.monotonic)

    def say(self, now: str, done: int | None = None) -> None:
        """Say what is done now and, unless None, how many parts are behind it."""
        self.now = now
        if done is not None:
            self.done = done


_tasks: ContextVar[list[Task] | None] = ContextVar("tasks", default=None)  # None: nobody looks


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Task]:
    """A task that is running inside the `with` block."""
    tasks, task = _tasks.get(), Task(what, total)
    if tasks is None:
        yield task
        return
    tasks.append(task)
    try:
        yield task
    finally:
        tasks.remove(task)


def say(now: str) -> None:
    """Say what the innermost running task does now."""
    if tasks := _tasks.get():
        tasks[-1].say(now)


@contextmanager
def watched(tasks: list[Task] | None) -> Iterator[None]:
    """Let tasks of the `with` block, in this thread, appear in a list while they run; None: in none."""
    token = _tasks.set(tasks)
    try:
        yield
    finally:
        _tasks.reset(token)
