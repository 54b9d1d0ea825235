"""Show what a command is doing, on a terminal, if it takes longer than two seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .console import rank

if TYPE_CHECKING:
    from rich.table import Table

    from ..ir.progress import Task

AFTER = 2.0  #: seconds; shorter tasks are not shown


@contextmanager
def shown(*, quiet: bool = False) -> Iterator[None]:
    """Show the tasks of the `with` block on standard error, if that is a terminal; ranks other than 0 show nothing."""
    from rich.console import Console
    from rich.live import Live

    from ..ir.progress import watched

    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    if quiet or rank() > 0 or not console.is_terminal:
        yield
        return
    tasks: list[Task] = []
    live = Live(
        console=console,
        refresh_per_second=5,
        transient=True,
        redirect_stdout=False,
        get_renderable=lambda: _lines([task for task in [*tasks] if time.monotonic() - task.started >= AFTER]),
    )
    with live, watched(tasks):
        yield


def _lines(tasks: list[Task]) -> Table:
    """A line for each task: what, how far, how long, and what it does now."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    table = Table.grid(padding=(0, 1))
    for task in tasks:
        seconds = time.monotonic() - task.started
        bar = ProgressBar(task.total, task.done, width=20, pulse=task.total is None, animation_time=seconds)
        count = f"{task.done} of {task.total}" if task.total else ""
        table.add_row(task.what, bar, count, f"{seconds:.0f} s", task.now)
    return table
