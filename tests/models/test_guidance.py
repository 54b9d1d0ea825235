"""Pipelines with `cfg=2`: guidance in one call of both branches, and in a call for each branch."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest

import fxpass
from fxpass.ir.advice import FxpassWarning
from fxpass.ir.mesh import Mesh
from fxpass.models.pipelines_zoo import build
from fxpass.runtime.lockstep import LockstepPlan
from fxpass.tools.sweeps.pipelines_case import PICTURE, difference

STEPS = 2  #: of the small pipelines


@pytest.mark.parametrize(
    ("name", "calls", "mesh", "runs"),
    [
        ("StableDiffusionPipeline", 1, Mesh(2, 1), STEPS),
        ("CogView4Pipeline", 2, Mesh(2, 1), STEPS),
        ("QwenImagePipeline", 2, Mesh(2, 1), STEPS),
        ("FluxPipeline", 1, Mesh(1, 2), STEPS),  # it has no guidance in calls
    ],
)
def test_guidance_on_two_ranks_gives_the_unsplit_result_in_one_run_for_each_step(
    name: str, calls: int, mesh: Mesh, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small: Any = build(name)
    expected = small.run()
    ran: list[LockstepPlan] = []
    original = LockstepPlan.run

    def run(self: LockstepPlan, *args: Any) -> Any:
        ran.append(self)
        return original(self, *args)

    monkeypatch.setattr(LockstepPlan, "run", run)
    fxpass.parallelize(small.pipeline, 2, cfg=2, executor="lockstep")
    alone = pytest.warns(FxpassWarning, match="did not come one after the other") if mesh.groups == 1 else nullcontext()
    with alone:
        assert difference(small.run(), expected) <= PICTURE
    plan: Any = fxpass.parallel(getattr(small.pipeline, "unet", None) or small.pipeline.transformer).plan
    assert (plan.calls, plan.mesh) == (calls, mesh)
    assert len(ran) == runs + 1  # and the decode of the picture
