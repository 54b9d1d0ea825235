"""What FXPASS_LOG shows."""

from __future__ import annotations

import os
import re
import sys
from subprocess import CompletedProcess

import pytest

from fxpass.passes import PASSES
from tests import forks

SCRIPT = """
import torch, fxpass
fxpass.parallelize(torch.nn.Conv2d(3, 3, 3, padding=1).eval(), 2, executor="lockstep")(torch.ones(1, 3, 8, 8))
"""


def run(*arguments: str, level: str | None) -> CompletedProcess[str]:
    """Run Python at a level. fxpass reads it when it is imported: by this process, not before it forks."""
    environment = os.environ | ({"FXPASS_LOG": level} if level else {})
    return forks.run([sys.executable, *arguments], env=environment, server="without fxpass", imports=())


@pytest.mark.parametrize("level", ["debug", "warning", None])
def test_captures_and_passes_are_shown_at_level_debug(level: str | None) -> None:
    ran = run("-c", SCRIPT, level=level)
    assert ran.returncode == 0, ran.stderr
    lines = [line.split(maxsplit=3)[1:] for line in ran.stderr.splitlines() if " fxpass " in line]
    assert ran.stdout == ""
    if level != "debug":
        assert lines == []
        return
    texts = [text for _, kind, text in lines if kind == "DEBUG"]
    assert texts[0].startswith("captured Conv2d")
    passes = [text.split()[1] for text in texts if text.startswith("pass ")]
    assert passes == [each.name for each in PASSES]
    assert "exchanges" in texts[-1]


def test_level_info_says_what_each_new_kind_of_call_costs() -> None:
    script = """
import torch, fxpass
model = fxpass.parallelize(torch.nn.Conv2d(3, 3, 3, padding=1).eval(), 2, executor="lockstep")
for rows in (8, 8, 16):
    model(torch.ones(1, 3, rows, 8))
"""
    ran = run("-c", script, level="info")
    assert ran.returncode == 0, ran.stderr
    lines = [line.partition(" fxpass INFO ")[2] for line in ran.stderr.splitlines() if " fxpass INFO " in line]
    cost = r"captured in \d+\.\d s, planned in \d+\.\d s; a rank needs about [\d.]+ k?B of activations"
    assert [
        bool(re.match(rf"a new kind of call: input \[1, 3, {rows}, 8\]; {cost}", line))
        for rows, line in zip((8, 16), lines, strict=True)
    ] == [True] * 2, lines


@pytest.mark.parametrize(
    ("arguments", "code"), [(["-c", "import fxpass"], 0), (["-m", "fxpass.tools.cli", "models"], 2)]
)
def test_an_unknown_level_is_said_in_one_line_and_refused_by_the_command(arguments: list[str], code: int) -> None:
    ran = run(*arguments, level="debgu")
    assert ran.returncode == code
    (line,) = ran.stderr.splitlines()
    assert "WARNING FXPASS_LOG=debgu: there is no such level; did you mean debug? The levels are debug, info" in line
    assert not ran.stdout
