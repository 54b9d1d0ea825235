"""Commands say what they are doing if that takes long, on terminals only."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fxpass.ir.progress import Task, progress, say, watched
from fxpass.make_plan import plan
from tests import forks
from tests.runtime.plans import block, inputs

ROOT = Path(__file__).resolve().parents[2]
SLOW = """
import sys, time
from fxpass.ir.progress import progress as task
from fxpass.tools import progress
from fxpass.tools.commands.app import app
progress.AFTER = 0.2
@app.command()
def sleep():
    with task("count sheep", 3) as each:
        each.say("the second", 1)
        time.sleep(1)
app(sys.argv[1:])
"""


class Recorded(list[Task]):
    """Tasks as they begin."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[Task] = []

    def append(self, task: Task) -> None:
        self.begun.append(task)
        super().append(task)


def test_capturing_and_planning_are_tasks_that_end() -> None:
    tasks = Recorded()
    with watched(tasks), progress("nothing"):
        assert tasks[0].done == 0
        plan(block(), *inputs(), world_size=2)
    assert [task.what for task in tasks.begun] == ["nothing", "capture Block", *["plan for 2 ranks"] * 2]
    assert (tasks.begun[-1].now, tasks.begun[-1].done, tasks.begun[-1].total) == ("schedule", 8, 9)
    assert tasks == []


def test_a_task_ends_with_an_error_and_the_innermost_says_what_it_does() -> None:
    tasks = Recorded()

    def failing() -> None:
        with progress("outer"), progress("inner"):
            say("look it up")
            raise KeyError

    with watched(tasks), pytest.raises(KeyError):
        failing()
    assert [(task.what, task.now) for task in tasks.begun] == [("outer", ""), ("inner", "look it up")]
    assert tasks == []


def test_nothing_is_kept_where_nobody_looks() -> None:
    with progress("unseen", 2) as task:
        say("heard by nobody")
    assert task.now == ""


def run(*arguments: str, terminal: bool) -> str:
    """What a command writes to standard error."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"}
    command = [sys.executable, "-c", SLOW, *arguments]
    if not terminal:
        return forks.run(command, env=environment).stderr
    ours, theirs = pty.openpty()
    child = forks.Forked(command, env=environment, stderr=theirs, stdout=subprocess.DEVNULL)
    os.close(theirs)
    text = b"".join(_read(ours)).decode()
    assert child.wait() == 0
    return text


def _read(terminal: int) -> Iterator[bytes]:
    while True:
        try:
            data = os.read(terminal, 1 << 16)
        except OSError:  # the other side is closed
            return
        if not data:
            return
        yield data


def test_a_terminal_shows_what_takes_long() -> None:
    text = run("sleep", terminal=True)
    assert "count sheep" in text
    assert "1 of 3" in text
    assert "the second" in text


@pytest.mark.parametrize("arguments", [("--quiet", "sleep"), ("sleep", "--quiet")])
def test_quiet_shows_nothing(arguments: tuple[str, ...]) -> None:
    assert "sheep" not in run(*arguments, terminal=True)


def test_a_file_or_pipe_gets_no_progress() -> None:
    assert run("sleep", terminal=False) == ""
