"""`make test` draws the same examples and numbers everywhere."""

from __future__ import annotations

import os
import sys
from functools import cache

import pytest

from tests import forks

DRAWS = """
{first}
import torch
from hypothesis import settings, strategies as st
import tests.properties as properties
settings.load_profile("fixed")
drawn = []

@properties.given(st.integers(0, 10**6), st.floats(0, 1), st.lists(st.sampled_from(range(100))))
def property(a, b, c):
    drawn.append((a, b, c, torch.randn(1).item()))

torch.randn({consumed})
property()
assert len(drawn) == 50
print(drawn)
"""


@cache
def plain() -> str:
    return draws({})


def draws(environment: dict[str, str], first: str = "", consumed: int = 0) -> str:
    """What a property draws, in a process of its own."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("CI", "HYPOTHESIS_PROFILE")}
    code = DRAWS.format(first=first, consumed=consumed)
    command = [sys.executable, "-c", code]
    ran = forks.run(command, env=inherited | environment, server="without fxpass", imports=())
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize(
    ("environment", "first", "consumed"),
    [({"CI": "true"}, "", 0), ({}, "import fxpass, fxpass.models.small", 0), ({}, "", 5)],
    ids=["in CI", "after other modules were imported", "after other random numbers"],
)
def test_a_property_draws_the_same_values_on_every_run(environment: dict[str, str], first: str, consumed: int) -> None:
    assert draws(environment, first, consumed) == plain()
