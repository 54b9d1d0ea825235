"""`fxpass plan --target`, `fxpass trace` and `fxpass calibrate`."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fxpass.ir.progress import watched
from fxpass.passes.targets import find
from tests.tools.command import fxpass
from tests.tools.test_progress import Recorded

GOOD = "tests.tools.models:good"


def test_a_plan_for_a_target_predicts_steps_a_generation_and_memory() -> None:
    text = fxpass("plan", GOOD, "--target", "H100", "--link", "pcie4", "--strategy", "displaced", "--steps", 20).stdout
    _, _, predicted = text.partition("predicted on H100 over pcie4, kernels launched one by one\n")
    assert re.search(r"^an exact step +\S+ [mu]s", predicted, re.MULTILINE)
    assert re.search(r"^a displaced step +\S+ [mu]s", predicted, re.MULTILINE)
    assert re.search(r"^20 steps +\S+ m?s", predicted, re.MULTILINE)
    assert re.search(
        r"^memory of a device: \S+ kB of 80\.0 GB, fits \(weights .*, state .*, activations .*\)$", predicted, re.M
    )
    assert "no split would be faster: 2 ranks over pcie4 would be slower than 1" in predicted  # it is tiny


def test_a_plan_without_a_target_predicts_nothing() -> None:
    assert "predicted" not in fxpass("plan", GOOD).stdout


def test_a_plan_as_json_holds_the_prediction() -> None:
    command = ("plan", GOOD, "--strategy", "displaced", "--json", "-")
    assert "prediction" not in json.loads(fxpass(*command).stdout)
    data = json.loads(fxpass(*command, "--target", "H100", "--steps", 7).stdout)["prediction"]
    assert (data["target"], data["ranks"], data["steps"]) == ("H100", 2, 7)
    assert data["seconds"] == 5 * data["exact"]["seconds"] + 2 * data["steady"]["seconds"]
    parts = [data["memory"][name] for name in ("weights", "state", "activations")]
    assert data["memory"]["total"] == sum(parts) > 0
    assert data["memory"]["fits"] is True


def test_comparing_shows_numbers_of_ranks_and_strategies() -> None:
    text = fxpass("plan", GOOD, "--target", "H100", "--graphs", "--compare").stdout
    assert "kernels launched as CUDA graphs" in text
    rows = re.findall(r"^(\d) +(sync|displaced)? +\d.* +\d", text.partition("speed")[2], re.MULTILINE)
    assert rows[0] == ("1", "")
    assert {("2", "sync"), ("2", "displaced"), ("4", "sync"), ("4", "displaced")} <= set(rows)
    assert len(rows) == len(set(rows))


@pytest.mark.parametrize("mesh", [("-n", 3), ("-n", 4, "--cfg", 2)], ids=["patches", "groups of patches"])
def test_a_trace_goes_to_a_file_or_to_standard_output(mesh: tuple[Any, ...], tmp_path: Path) -> None:
    command = ("trace", GOOD, *mesh, "--target", "H100", "-o")
    fxpass(*command, tmp_path / "trace.json")
    written = (tmp_path / "trace.json").read_text()
    assert {each["pid"] for each in json.loads(written)["traceEvents"]} == set(range(mesh[1]))
    assert fxpass(*command, "-").stdout == written


def bars(path: Path) -> list[dict[str, Any]]:
    return [each for each in json.loads(path.read_text())["traceEvents"] if each["ph"] == "X"]


@pytest.fixture(scope="module")
def timelines(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """The predicted one and the measured one of a generation with displaced steps."""
    folder = tmp_path_factory.mktemp("timelines")
    command = ("trace", GOOD, "-n", 2, "--strategy", "displaced", "-o")
    fxpass(*command, folder / "predicted.json")
    fxpass(*command, folder / "measured.json", "--measured")
    return [bars(folder / "predicted.json"), bars(folder / "measured.json")]


def test_a_measured_timeline_has_the_names_and_bytes_of_the_predicted_one(
    timelines: list[list[dict[str, Any]]],
) -> None:
    predicted, measured = timelines
    steps = [each["name"] for each in measured if each["cat"] == "step" and each["pid"] == 1]
    assert steps == ["exact step", "displaced step", "displaced step"]
    named = {(each["pid"], each["cat"], each["name"], each["args"].get("module")) for each in measured}
    assert named >= {(each["pid"], each["cat"], each["name"], each["args"].get("module")) for each in predicted}
    received = [
        {(each["pid"], key): size for each in found for key, size in each["args"].items() if key.startswith("x")}
        for found in (predicted, measured)
    ]
    assert received[0] == received[1]
    assert received[0]


def test_bars_of_a_measured_timeline_lie_in_the_steps_and_those_of_a_thread_do_not_overlap(
    timelines: list[list[dict[str, Any]]],
) -> None:
    _, found = timelines
    for rank in (0, 1):
        steps = [each for each in found if each["pid"] == rank and each["cat"] == "step"]
        assert len(steps) == 3
        for thread in (0, 1, 2):
            lane = [each for each in found if (each["pid"], each["tid"]) == (rank, thread) and each["cat"] != "step"]
            times = sorted((each["ts"], each["ts"] + each["dur"]) for each in lane)
            assert times
            assert all(a[1] <= b[0] + 0.01 for a, b in pairwise(times))
            for start, end in times if thread == 0 else ():
                assert any(step["ts"] <= start and end <= step["ts"] + step["dur"] + 0.01 for step in steps)


def test_a_dump_shows_the_mesh_and_the_strategy_that_auto_chooses() -> None:
    command = ("dump", GOOD, "--target", "H100", "--unfold", "--strategy")
    divided = fxpass(*command, "sync", "--cfg", 2).stdout
    assert fxpass(*command, "auto").stdout == divided != fxpass(*command, "sync").stdout


def test_a_timeline_of_the_strategy_auto_can_be_measured(tmp_path: Path) -> None:
    done = fxpass("trace", GOOD, "-n", 2, "--strategy", "auto", "--measured", "-o", tmp_path / "measured.json")
    assert done.exit_code == 0, done.stderr
    assert {each["pid"] for each in bars(tmp_path / "measured.json")} == {0, 1}


def test_a_measured_timeline_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    done = fxpass("trace", GOOD, "--measured", "--target", "H100", "-o", tmp_path / "measured.json")
    assert done.exit_code == 2
    assert "leave out --target" in done.stderr
    done = fxpass("trace", GOOD, "-n", 500, "--measured", "-o", tmp_path / "measured.json")
    assert done.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_calibrate_writes_a_target_for_plans(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    with watched(tasks := Recorded()):
        fxpass("calibrate", "-o", path, "--name", "mine")
    assert [task.what for task in tasks.begun] == ["measure links between two processes", "measure cpu"]
    target = find(str(path))
    assert target.name == "mine"
    assert target.device.matrix["float32"] > target.device.bandwidth > target.link.bandwidth / 10 > 0
    assert 0 < target.device.kernel < target.link.latency < 1
    assert target.device.memory > 1e9
    assert find(str(path), "gloo").link.medium == "bus"
    text = fxpass("plan", GOOD, "--target", path, "--link", "gloo").stdout
    assert "predicted on mine over gloo\n" in text or "predicted on mine\n" in text


def test_calibrate_refuses_what_it_cannot_measure_or_write() -> None:
    for arguments, message in (
        (("-o", "mine"), "does not end in .toml"),
        (("-o", "mine.toml", "--device", "tpu"), "there is no device 'tpu'"),
        (("-o", "mine.toml", "--link", "nvlink9"), "no link is called 'nvlink9'; did you mean nvlink"),
    ):
        result = fxpass("calibrate", *arguments)
        assert result.exit_code == 2
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
