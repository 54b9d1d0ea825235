"""What FXPASS_LOG shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from fxpass.passes import PASSES

SCRIPT = """
import torch, fxpass
fxpass.parallelize(torch.nn.Conv2d(3, 3, 3, padding=1).eval(), 2, executor="lockstep")(torch.ones(1, 3, 8, 8))
"""


@pytest.mark.parametrize("level", ["debug", "warning", None])
def test_captures_and_passes_are_shown_at_level_debug(level: str | None) -> None:
    environment = os.environ | ({"FXPASS_LOG": level} if level else {})
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    lines = [line.split(maxsplit=3)[1:] for line in run.stderr.splitlines() if " fxpass " in line]
    assert run.stdout == ""
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
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"FXPASS_LOG": "info"}, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    lines = [line.partition(" fxpass INFO ")[2] for line in run.stderr.splitlines() if " fxpass INFO " in line]
    cost = r"captured in \d+\.\d s, planned in \d+\.\d s; a rank needs about [\d.]+ k?B of activations"
    assert [
        bool(re.match(rf"a new kind of call: input \[1, 3, {rows}, 8\]; {cost}", line))
        for rows, line in zip((8, 16), lines, strict=True)
    ] == [True] * 2, lines


@pytest.mark.parametrize(
    ("arguments", "code"), [(["-c", "import fxpass"], 0), (["-m", "fxpass.tools.cli", "models"], 2)]
)
def test_an_unknown_level_is_said_in_one_line_and_refused_by_the_command(arguments: list[str], code: int) -> None:
    run = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"FXPASS_LOG": "debgu"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert run.returncode == code
    (line,) = run.stderr.splitlines()
    assert "WARNING FXPASS_LOG=debgu: there is no such level; did you mean debug? The levels are debug, info" in line
    assert not run.stdout
