"""The harness finds rules that break law 1."""

from typing import Any

import pytest
import torch
from torch import fx

from fxpass.ir.layout import WHOLE
from fxpass.ir.program import layout_of, shape_of
from fxpass.passes.partition import Op, Partitioner
from fxpass.passes.rules import RULES
from tests.passes import harness
from tests.passes.examples import randn
from tests.passes.harness import evenly, split

aten = torch.ops.aten


def sine_by_way_of_a_maximum(p: Partitioner, op: Op, x: fx.Node) -> fx.Node:
    """The result is right, but the maximum of each rank's own rows is said to be the whole value's."""
    dtype, layout = op.dtype, layout_of(x)
    most = p.emit(aten.amax.default, (x, [0], True), shape=(1, *shape_of(x)[1:]), dtype=dtype, layout=WHOLE)
    nothing = p.emit(aten.sub.Tensor, (most, most), shape=shape_of(most), dtype=dtype, layout=WHOLE)
    return p.emit(
        aten.add.Tensor, (p.same(op, (x,), layout=layout), nothing), shape=op.shape, dtype=dtype, layout=layout
    )


def test_a_value_inside_a_rule_that_differs_between_ranks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    rules: dict[Any, Any] = dict(RULES) | {aten.sin.default: sine_by_way_of_a_maximum}
    monkeypatch.setattr(harness, "RULES", rules)
    with pytest.raises(AssertionError, match="other rows than the ranks before it: %amax"):
        split(torch.sin, (randn(4, 3),), {0: evenly(0, 4, 2)}, 2)
