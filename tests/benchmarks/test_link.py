"""The emulated link is skipped with a reason where it is impossible, and leaves nothing behind elsewhere."""

import subprocess
import sys

import pytest

from benchmarks import emulated_link, link

needs_link = pytest.mark.skipif(emulated_link.missing() is not None, reason=emulated_link.missing() or "")


def existing() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
    return {line.split()[0] for line in listed.splitlines()}


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulated_link.sys, "platform", "linux")
    monkeypatch.setattr(emulated_link.shutil, "which", lambda tool: None if tool == "tc" else tool)
    assert emulated_link.missing() == "tc not found; apt-get install iproute2"
    monkeypatch.setattr(emulated_link.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(emulated_link.os, "geteuid", lambda: 1000)
    assert emulated_link.missing() == "network namespaces need root"


def test_a_command_that_fails_is_a_reason_to_skip(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = emulated_link.run
    monkeypatch.setattr(emulated_link, "run", lambda *_: run("ls", "/nowhere"))
    monkeypatch.setattr(emulated_link, "delete", lambda namespace: None)
    assert emulated_link.run_ranks("benchmarks.link") == 0
    assert capsys.readouterr().out.startswith("skipped: `ls /nowhere` failed: ls: ")


def test_rates_are_read_as_tc_writes_them() -> None:
    assert (emulated_link.bits("300mbit"), emulated_link.bits("1gbit")) == (3e8, 1e9)
    with pytest.raises(ValueError, match="not '3 furlongs'"):
        emulated_link.bits("3 furlongs")


@needs_link
@pytest.mark.parametrize("dead", [0, 1])
def test_a_dead_rank_ends_the_other_and_removes_the_namespaces(dead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before, started, seen = existing(), [], set()

    def start(rank: int, namespace: str, module: str) -> subprocess.Popen[bytes]:
        seen.update(existing() - before)
        task = ["sh", "-c", "exit 3"] if rank == dead else ["sleep", "60"]
        started.append(subprocess.Popen(["ip", "netns", "exec", namespace, *task]))
        return started[-1]

    monkeypatch.setattr(emulated_link, "start", start)
    assert emulated_link.run_ranks("benchmarks.link") != 0
    assert len(seen) == 2
    assert [rank.returncode for rank in started] == [3 if rank == dead else -15 for rank in range(2)]
    assert not existing() & seen


@pytest.mark.parametrize("option", ["--rates", "--burst"])
def test_wrong_amounts_are_refused_before_anything_is_created(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["link", option, "much"])
    with pytest.raises(SystemExit):
        link.main()
    assert f"argument {option}: invalid amount value: 'much'" in capsys.readouterr().err
