"""Commands that plan more patches than processes, and unequal ones."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from fxpass.capture import capture
from fxpass.ir.program import Program
from fxpass.ir.strategy import Strategy
from fxpass.make_plan import make_plan
from fxpass.models.resolve import Options, resolve
from fxpass.plan import Plan
from fxpass.predict.compare import advice
from fxpass.report.facts import Facts
from fxpass.report.page import page
from fxpass.tools.commands.plan import deal_of, show
from fxpass.tools.console import console
from tests.tools.command import fxpass

MODEL = "small:unet_sd"
PATCHES = ("-n", "2", "--patches", "4", "--strategy", "displaced")


@cache
def program() -> Program:
    model = resolve(MODEL, Options())
    return capture(model.module, *model.args, **model.kwargs)


@cache
def planned(
    patches: int | None = None, speeds: tuple[float, ...] | None = None, processes: int = 2, target: str = "auto"
) -> Plan:
    deal = deal_of(processes, 1, 1, patches, [*speeds] if speeds else None)
    return make_plan(program(), processes, Strategy.of("displaced"), target, deal=deal)


def test_a_plan_says_its_processes_and_patches(capsys: Any) -> None:
    plan = planned(patches=4)
    show(console(), "a model", plan)
    printed = capsys.readouterr().out
    assert "a model on 4 ranks on 2 processes, strategy displaced" in printed
    assert "slowest process" in printed
    described = json.loads(json.dumps(plan.describe()))
    assert (described["ranks"], described["processes"], described["ranks_per_process"]) == (4, 2, [2, 2])


def test_a_plan_says_its_speeds() -> None:
    assert planned(speeds=(1.0, 0.5)).describe()["speeds"] == [1.0, 0.5]


def test_a_dump_says_which_process_runs_its_rank() -> None:
    head, cut, *_ = fxpass("dump", MODEL, *PATCHES, "--rank", "3").stdout.splitlines()
    assert head == "small:unet_sd, rank 3 of 4 on process 1 of 2, after schedule"
    assert "[B, C, H/4, W]" in cut
    before = fxpass("dump", MODEL, *PATCHES, "--after", "captured", "--rank", "2").stdout.splitlines()[0]
    assert before == "small:unet_sd, rank 2 of 4 on process 1 of 2, after captured"


@pytest.mark.parametrize("command", ["dump", "explain"])
def test_ranks_are_counted_over_all_processes(command: str) -> None:
    node = ["x0.0"] if command == "explain" else []
    assert fxpass(command, MODEL, *node, *PATCHES, "--rank", "3").exit_code == 0
    wrong = fxpass(command, MODEL, *node, *PATCHES, "--rank", "4")
    assert (wrong.exit_code, wrong.stderr) == (2, "error: there is no rank 4: ranks are counted from 0 to 3\n")


@pytest.mark.parametrize("command", ["dump", "explain", "report", "trace"])
def test_patches_that_cannot_be_dealt_are_refused(command: str, tmp_path: Any) -> None:
    more = {"dump": [], "explain": ["x0.0"]}.get(command, ["-o", str(tmp_path / "made")])
    wrong = fxpass(command, MODEL, *more, "-n", "2", "--patches", "3")
    assert wrong.exit_code == 2
    assert "3 patches cannot be dealt evenly to the 2 processes" in wrong.stderr
    wrong = fxpass(command, MODEL, *more, "-n", "2", "--speed", "1", "--speed", "2", "--strategy", "auto")
    assert wrong.exit_code == 2
    assert "patches and speeds are for a strategy that is named" in wrong.stderr


def test_a_trace_has_a_process_for_its_ranks_and_bytes_between_processes(tmp_path: Any) -> None:
    file = tmp_path / "trace.json"
    fxpass("trace", MODEL, *PATCHES, "--target", "H100", "-o", file)
    events = json.loads(file.read_text())["traceEvents"]
    names = [each["args"]["name"] for each in events if each["name"] == "process_name"]
    assert names == ["process 0 (ranks 0, 1)", "process 1 (ranks 2, 3)"]
    messages = [each["args"] for each in events if each.get("cat") == "message"]
    assert messages
    for each in messages:
        sizes = {name: size for name, size in each.items() if name.startswith("x")}
        senders = [size for name, size in each.items() if ">" in name]
        assert sum(sizes.values()) == sum(senders) > 0
    steps = [each for each in events if each.get("cat") == "step" and each["pid"] == 0]
    plan = planned(patches=4)
    assert steps[0]["dur"] == pytest.approx(plan.predict("H100").exact.seconds * 1e6, rel=1e-3)
    measured = fxpass("trace", MODEL, *PATCHES, "--measured", "-o", file)
    assert (measured.exit_code, "leave out --patches" in measured.stderr) == (2, True)


def test_a_report_shows_processes_and_compares_with_one_rank() -> None:
    plan = planned(patches=4)
    facts = Facts(MODEL, plan, steps=5)
    assert facts.prediction.exact.seconds == plan.predict().exact.seconds
    assert facts.alone is not None
    assert facts.alone.world == 1
    text = page(facts)
    assert '"process":"process 1 (ranks 2, 3)"' in text
    assert "4 ranks on 2 processes, displaced" in text
    one_process = Facts(MODEL, planned(patches=2, processes=1), steps=5)
    assert one_process.alone is not None
    assert one_process.alone is not one_process.prediction


def test_advice_names_patches_where_nothing_else_differs() -> None:
    several, each_one = planned(patches=4).predict(), planned().predict()
    assert (advice(several, [each_one], 50) or "").startswith(
        "one patch of the whole model on each process would be faster: "
    )
    turns, alone = planned(patches=2, processes=1).predict(), planned(processes=1).predict()
    assert (advice(turns, [alone], 50) or "").startswith("no split would be faster: several patches in turn take ")


def test_a_report_of_a_device_whose_host_launches_nothing_has_no_column_for_it() -> None:
    plan = planned()
    assert "launching" not in page(Facts(MODEL, plan, compare=False)).partition("<script")[0]
    assert "launching kernels" in page(Facts(MODEL, planned(target="H100"), compare=False)).partition("<script")[0]
