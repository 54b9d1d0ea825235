"""Real models at their usual size are planned without weights, in seconds, on a laptop."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, resource, sys
import torch
torch.set_num_threads(1)
from fxpass.models import catalog
import fxpass

module, inputs = catalog.load(sys.argv[1])
used = lambda: sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
before = used()
plan = fxpass.plan(module, world_size=8, **inputs)
print(json.dumps({
    "seconds": used() - before,
    "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "bound": plan.bound,
    "fallbacks": [str(e) for e in plan.fallbacks],
    "roles": plan.bytes_by_role,
}))
"""


@pytest.mark.parametrize(
    "name",
    [
        "sdxl",
        "flux-dev",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("sd15", "dit-xl-512", "pixart-sigma", "sd35-medium", "hunyuan-dit", "sana-1600m", "wan21-1.3b")
        ),
    ],
)
def test_a_real_model_is_shared_among_8_ranks_without_weights(name: str) -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT, name], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["seconds"] < 20, "CPU seconds of capture and plan"
    assert found["bytes"] < 2e9, "peak memory of the process"
    assert found["fallbacks"] == []
    assert found["bound"] >= 7.5
    overhead = sum(found["roles"].get(role, 0) for role in ("realign", "small", "rebalance"))
    assert overhead < 0.03 * sum(found["roles"].values())
