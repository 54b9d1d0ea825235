"""`fxpass plan` of more patches than processes, and of unequal ones."""

from __future__ import annotations

import json
from typing import Any

from fxpass.models.resolve import Options
from fxpass.tools.commands.plan import make, show
from fxpass.tools.console import console


def planned(**options: Any) -> Any:
    return make("small:unet_sdxl", 2, "displaced", "auto", Options(), **options)


def test_a_plan_says_its_processes_and_patches(capsys: Any) -> None:
    plan = planned(patches=4)
    show(console(), "a model", plan)
    printed = capsys.readouterr().out
    assert "a model on 4 ranks on 2 processes, strategy displaced" in printed
    assert "slowest process" in printed
    described = json.loads(json.dumps(plan.describe()))
    assert (described["ranks"], described["processes"], described["ranks_per_process"]) == (4, 2, [2, 2])


def test_a_plan_says_its_speeds() -> None:
    assert planned(speeds=[1.0, 0.5]).describe()["speeds"] == [1.0, 0.5]
