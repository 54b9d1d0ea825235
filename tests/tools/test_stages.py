"""Commands that look at plans in stages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fxpass.inspect import store
from tests.tools.command import fxpass

MODEL = "tests.tools.models:good"
STAGES = ("-n", 4, "--stages", 2)


def test_a_plan_shows_the_stage_of_each_process() -> None:
    text = fxpass("plan", MODEL, *STAGES).stdout
    assert "on 4 ranks (2 stages of 2 patches), strategy sync" in text
    rows = [line.split() for line in text.partition("\nmemory\n")[2].splitlines()[1:5]]
    assert [row[:2] for row in rows] == [["0", "0"], ["1", "0"], ["2", "1"], ["3", "1"]]


def test_a_dump_of_a_rank_holds_what_its_stage_runs() -> None:
    first, last = (store.from_json(fxpass("dump", MODEL, *STAGES, "--rank", r, "-f", "json").stdout) for r in (0, 3))
    assert first.world == last.world == 4
    ran = [{node.name for node in each.nodes if node.kind == "operator"} for each in (first, last)]
    assert ran[0] - ran[1]
    assert ran[1] - ran[0]
    assert any(each.role == "transfer" for each in last.exchanges)


def test_before_the_depth_is_cut_a_dump_is_of_the_ranks_of_one_stage() -> None:
    heads = [
        fxpass("dump", MODEL, *STAGES, "--rank", 3, "--after", after).stdout.splitlines()[0]
        for after in ("captured", "trim", "stages")
    ]
    assert [head.partition(", rank ")[2] for head in heads] == [
        "1 of 2, after captured",
        "1 of 2, after trim",
        "3 of 4, after stages",
    ]
    assert "transfer(" in fxpass("dump", MODEL, *STAGES, "--rank", 3, "--diff", "stages").stdout


def test_transfers_are_explained() -> None:
    shown = fxpass("dump", MODEL, *STAGES, "--rank", 2, "--op", "transfer").stdout
    name = next(word for line in shown.splitlines() for word in line.split()[:1] if word.startswith("x"))
    text = fxpass("explain", MODEL, name, *STAGES, "--rank", 2).stdout
    assert "because another stage of the model reads the value" in text


def test_a_report_shows_which_ranks_hold_rows(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    done = fxpass("report", MODEL, *STAGES, "--no-compare", "-o", file)
    assert done.exit_code == 0, done.stderr
    text = file.read_text()
    assert "4 ranks (2 stages of 2 patches)" in text
    assert all(f'"ranks":"ranks {ranks}"' in text for ranks in ("0, 2", "1, 3"))


def test_a_trace_has_the_messages_between_stages(tmp_path: Path) -> None:
    done = fxpass("trace", MODEL, *STAGES, "-o", tmp_path / "trace.json")
    assert done.exit_code == 0, done.stderr
    bars = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    sent = [key for each in bars if each.get("cat") == "message" for key in each["args"] if ">" in key]
    assert {"0 > 2", "1 > 3"} <= set(sent)


@pytest.mark.parametrize("command", ["plan", "dump", "explain", "report", "trace", "trace --measured"])
def test_stages_that_cannot_be_are_refused_in_one_line(command: str, tmp_path: Path) -> None:
    name, *more = command.split()
    more += {"plan": [], "dump": [], "explain": ["x0.0"]}.get(name, ["-o", str(tmp_path / "made")])
    uneven = fxpass(name, MODEL, *more, "-n", 4, "--stages", 3)
    assert uneven.exit_code == 2
    assert uneven.stderr.startswith("error: the 4 processes cannot be divided evenly into 3 stages")
    unnamed = fxpass(name, MODEL, *more, *STAGES, "--strategy", "auto")
    assert unnamed.exit_code == 2
    assert unnamed.stderr.startswith("error: stages, patches and speeds are for a strategy that is named")
    assert len((uneven.stderr + unnamed.stderr).splitlines()) == 2
    assert not list(tmp_path.iterdir())


def test_stages_have_no_onnx_form(tmp_path: Path) -> None:
    done = fxpass("dump", MODEL, *STAGES, "-f", "onnx", "-o", tmp_path / "made.onnx")
    assert done.exit_code == 2
    assert done.stderr == "error: transfers between stages have no ONNX form; leave out --stages\n"
