"""The sweep of pipelines: kept results and the report."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from fxpass.models.pipelines_zoo import files_of, names
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
            "| amplifies; calls by 1e-04 (in float64 by 3e-13), equal noise",
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


def test_the_report_has_a_row_for_each_use() -> None:
    assert "| LoRA loaded | equal | needs peft |" in report([GOOD], [], {"LoRA loaded": ("equal", "needs peft")})


def test_a_result_depends_on_the_file_of_its_family() -> None:
    assert [path.name for path in files_of("FluxPipeline")] == ["flux.py"]
    assert len(names()) > 250
