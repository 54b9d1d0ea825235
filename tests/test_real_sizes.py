"""Real models at their usual size are planned without weights, in seconds, and their work is shared evenly."""

from functools import lru_cache

import pytest

from fxpass.models.catalog import catalog
from fxpass.tools.sweeps.balance import Balance, measured

QUICK = ("sdxl",)
each_model = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in catalog]
)


@lru_cache
def on_8_ranks(name: str, hash_seed: str = "1") -> Balance:
    return measured(name, (8,), PYTHONHASHSEED=hash_seed)[0]


@each_model
def test_a_real_model_is_planned_without_weights_in_seconds_and_shared_evenly_among_8_ranks(name: str) -> None:
    found = on_8_ranks(name)
    assert found.fallbacks == 0
    assert found.bound >= 7.5 or found.bound >= 0.98 * found.ideal, f"{found.bound:.2f}, ideal {found.ideal:.2f}"
    assert found.overhead < 0.01, "share of the bytes that only serves the cuts"
    assert found.capture + found.plan < 20, "CPU seconds"
    assert found.memory < 2e9, "bytes at the peak of the process"


@pytest.mark.slow  # ranks of torchrun have hash seeds of their own, and compare their plans (test_processes.py)
@pytest.mark.parametrize("name", ["sdxl", "flux-dev"])
def test_processes_with_another_hash_seed_make_the_same_plan(name: str) -> None:
    assert on_8_ranks(name, "1").fingerprint == on_8_ranks(name, "2").fingerprint
