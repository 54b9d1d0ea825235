"""Processes that measure together."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import pytest

from fxpass.predict.ranks import run_ranks

pytestmark = pytest.mark.usefixtures("new_processes")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes that are started; the third cannot be."""
    found: list[subprocess.Popen[bytes]] = []
    start: Any = subprocess.Popen

    def limited(*args: Any, **kwargs: Any) -> Any:
        if len(found) == 2:
            raise OSError("too many processes")
        found.append(start(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(subprocess, "Popen", limited)
    return found


def test_no_rank_goes_on_when_another_could_not_be_started(started: list[subprocess.Popen[bytes]]) -> None:
    with pytest.raises(OSError, match="too many processes"):
        run_ranks("fxpass.predict.link_rank", (), 3, 60.0)
    assert [each.poll() is not None for each in started] == [True, True]


def test_a_rank_that_fails_is_named_and_the_others_end(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match=r"link_rank: rank [01] has failed; its error is above"):
        run_ranks("fxpass.predict.link_rank", ("unexpected",), 2, 60.0)
    assert "Error" in capfd.readouterr().err


def test_ranks_that_take_too_long_end(started: list[subprocess.Popen[bytes]]) -> None:
    with pytest.raises(TimeoutError, match="the ranks have not ended within"):
        run_ranks("fxpass.predict.link_rank", (), 2, 0.5)
    assert all(each.poll() is not None for each in started)


def test_ctrl_c_reaches_this_process_alone_which_ends_the_ranks(
    started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[int] = []

    def interrupt(_: float) -> None:
        groups.extend(os.getpgid(each.pid) for each in started)
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_ranks("fxpass.predict.link_rank", (), 2, 60.0)
    assert len(groups) == 2
    assert os.getpgrp() not in groups
    assert all(each.poll() is not None for each in started)
