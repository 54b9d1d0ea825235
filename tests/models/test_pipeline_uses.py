"""What people do with pipelines, before and after `parallelize`: the result is that of an unsplit pipeline."""

from __future__ import annotations

import pytest

from fxpass.models.pipelines_zoo.uses import USES
from fxpass.tools.sweeps.pipeline_uses import orders_of, outcome

#: uses that run at every change; the others are slow tests, and all are in docs/pipelines.md
QUICK = ("failed", "ip_adapter")


def marked(name: str, *more: str) -> object:
    use = USES[name]
    marks = [] if name in QUICK else [pytest.mark.slow]
    if use.missing:
        marks.append(pytest.mark.skip(reason=f"needs the package {use.missing}"))
    return pytest.param(name, *more, marks=marks)


def is_right(name: str, found: str) -> bool:
    refused = USES[name].refused
    return found.startswith(f"refused: {refused}") if refused else found == "equal"


@pytest.mark.parametrize("name", [marked(name) for name in USES if "before" in orders_of(name)])
def test_what_is_done_before_parallelize_is_kept(name: str) -> None:
    assert is_right(name, outcome(name, "before"))


@pytest.mark.parametrize("name", [marked(name) for name in USES if "after" in orders_of(name)])
def test_what_is_done_after_parallelize_is_followed(name: str) -> None:
    assert is_right(name, outcome(name, "after"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [marked(name) for name in USES if "stale" in orders_of(name)])
def test_what_is_done_after_parallelize_is_followed_under_a_stale_strategy(name: str) -> None:
    assert outcome(name, "stale") == "equal"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "order"),
    [marked(name, order) for name in USES for order in ("spawn", "torchrun") if order in orders_of(name)],
)
def test_what_is_done_after_parallelize_reaches_other_processes(name: str, order: str) -> None:
    assert outcome(name, order) == "equal"
