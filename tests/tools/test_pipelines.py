"""The sweep of pipelines: kept results and the report."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fxpass.models.pipelines_zoo import files_of, names
from fxpass.tools.checkout import head
from fxpass.tools.sweeps import pipelines
from fxpass.tools.sweeps.pipelines_case import Found
from fxpass.tools.sweeps.pipelines_report import report

GOOD = Found("TinyPipeline", "k", error=1e-7, split=("unet", "vae"))


def test_results_of_pipelines_survive_json() -> None:
    found = replace(GOOD, whole=("vae.decode runs unsplit",), calls=1e-7, noise=2e-7)
    assert Found.of(json.loads(json.dumps(asdict(found)))) == found


def test_a_stopped_measurement_is_a_failed_one() -> None:
    assert Found.of({"name": "TinyPipeline", "key": "k", "failed": "it took more than 3 seconds"}).verdict == "failed"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"error": 1e-2}, "- TinyPipeline: the result differs by 1e-02"),
        ({"error": float("nan")}, "- TinyPipeline: the result differs by nan"),
        ({"error": 1e-2, "calls": 1e-6, "noise": 9e-3}, "| unet, vae | 1e-02 | amplifies; calls by 1e-06"),
        (
            {"error": 1e-2, "calls": 1e-4, "double": 3e-13, "noise": 9e-3},
            "| amplifies; in float64 by 3e-13; calls by 1e-04, equal noise",
        ),
        ({"refused": "CaptureError: no"}, "- TinyPipeline: CaptureError: no"),
        ({"failed": "ValueError: no"}, "- TinyPipeline: ValueError: no"),
        ({"none": "TypeError: no denoiser"}, "- TinyPipeline: TypeError: no denoiser"),
        ({"left_out": "needs the package x"}, "1 (50.0%) are left out"),
        ({"whole": ("vae.decode runs unsplit: why",)}, "unsplit: vae.decode runs unsplit: why |"),
        ({"blind": "the unsplit result is constant"}, "the unsplit result is constant |"),
    ],
)
def test_the_report_of_pipelines_lists_every_problem(changes: dict[str, Any], told: str) -> None:
    other = replace(GOOD, name="OtherPipeline")
    assert told not in report([GOOD, other], [])
    assert told in report([replace(GOOD, **changes), other], [])


def test_the_report_says_how_many_give_the_unsplit_result() -> None:
    amplifies = replace(GOOD, error=1e-2, calls=1e-6, noise=9e-3)
    text = report([GOOD, amplifies, replace(GOOD, error=1.0), replace(GOOD, left_out="needs the package x")], [])
    assert "4 classes; 1 (25.0%) are left out. Of the other 3, 2\n(66.7%) give the unsplit result:" in text


def test_the_report_says_at_which_commit_each_result_was_measured() -> None:
    usual = [replace(GOOD, name=f"{letter}Pipeline", commit="abc") for letter in "AB"]
    assert "Measured at commit abc." in report(usual, [])
    text = report([*usual, replace(GOOD, commit="def"), replace(GOOD, name="Wrong", error=1.0)], [])
    assert "Measured at commit abc, but for 2 results that say where." in text
    assert "| TinyPipeline | unet, vae | 1e-07 | measured at def |" in text
    assert "- Wrong: the result differs by 1e+00 (measured at an unknown commit)" in text


def test_a_sweep_keeps_the_commit_of_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(_: Any, keys: dict[str, str], *__: Any, **___: Any) -> list[tuple[str, dict[str, Any]]]:
        return [(name, {"name": name, "key": key, "failed": "no"}) for name, key in keys.items()]

    monkeypatch.setattr(pipelines, "measured", measured)
    monkeypatch.setattr(pipelines, "names", lambda: ["UNet"])
    monkeypatch.setattr(pipelines, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr("sys.argv", ["pipelines", "--only", "UNet", "--folder", str(tmp_path / "out")])
    (tmp_path / "out").mkdir()
    pipelines.main()
    assert json.loads((tmp_path / "out" / "UNet.json").read_text())["commit"] == head()
    assert f"Measured at commit {head()}." in (tmp_path / "docs" / "pipelines.md").read_text()


def test_the_report_has_a_row_for_each_use() -> None:
    outcomes = ("equal", "needs peft", "equal", "")
    assert "| LoRA loaded | equal | needs peft | equal |  |" in report([GOOD], [], {"LoRA loaded": outcomes})


def test_a_result_depends_on_the_file_of_its_family() -> None:
    assert [path.name for path in files_of("FluxPipeline")] == ["flux.py"]
    assert len(names()) > 250
