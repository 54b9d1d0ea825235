"""What cannot be split is named once, with its module, its shapes and what it costs; `strict` refuses it."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import fxpass
from tests.tools.command import fxpass as command
from tests.tools.models import unsplittable

NAMES = (
    "lgamma_default in inner",
    "no rule for aten.lgamma.default",
    "2x3x8x6",
    "igamma_default in the model",
    "no rule for aten.igamma",
)
COMMAND = "tests.tools.models:unsplittable"


def model() -> tuple[Any, tuple[Any, ...]]:
    module, inputs, _ = unsplittable()
    return module, inputs


def test_a_plan_names_each_operator_once_with_module_shapes_and_bytes() -> None:
    module, inputs = model()
    plan = fxpass.plan(module, *inputs, world_size=2)
    inner, outer = plan.gathered
    assert (inner.node, inner.path, inner.shapes) == ("lgamma_default", "inner", ((2, 3, 8, 6),))
    assert inner.bytes == 2 * 3 * 8 * 6 * 4  # each of two ranks receives half
    assert outer.shapes == ((2, 3, 8, 6), (2, 3, 8, 6))  # two operands, one operator
    for name in NAMES:
        assert str(plan).count(name) in (1, 3)
    assert [each["node"] for each in plan.describe()["fallbacks"]] == ["lgamma_default", "igamma_default"]


def test_parallelize_warns_of_gathered_operators_and_stays_exact() -> None:
    module, inputs = model()
    split = fxpass.parallelize(module, 2, executor="lockstep")
    with torch.no_grad(), pytest.warns(UserWarning, match="2 operators cannot be split") as caught:
        found = split(*inputs)
    assert all(name in str(caught[0].message) for name in NAMES)
    torch.testing.assert_close(found, module(*inputs))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        split(*inputs)  # once is enough
    split.close()


def test_strict_refuses_and_lists_operators_that_cannot_be_split() -> None:
    module, inputs = model()
    with pytest.raises(fxpass.FallbackError) as refused:
        fxpass.plan(module, *inputs, world_size=2, strict=True)
    assert all(name in str(refused.value) for name in NAMES)
    split = fxpass.parallelize(module, 2, executor="lockstep", strict=True)
    with pytest.raises(fxpass.FallbackError), torch.no_grad():
        split(*inputs)
    split.close()


def test_strict_accepts_models_that_can_be_split() -> None:
    conv = nn.Conv2d(3, 3, 3, padding=1).eval()
    assert not fxpass.plan(conv, torch.randn(2, 3, 8, 6), world_size=2, strict=True).gathered


@pytest.mark.parametrize("words", [("plan",), ("check", "-n", "2")])
def test_the_command_line_can_be_strict(words: tuple[str, ...]) -> None:
    refused = command(*words, COMMAND, "--strict")
    assert refused.exit_code != 0
    assert "lgamma_default in inner" in refused.stderr
    if words == ("plan",):
        loose = " ".join(command(*words, COMMAND).stdout.split())
        assert "lgamma_default inner 2x3x8x6" in loose


def test_a_dump_names_what_is_gathered() -> None:
    text = command("dump", COMMAND).stdout
    lgamma = "lgamma_default in inner: no rule for aten.lgamma.default; 2x3x8x6 fetched whole"
    assert len(re.findall(rf"fallback x\d+\.0: {re.escape(lgamma)}", text)) == 1
