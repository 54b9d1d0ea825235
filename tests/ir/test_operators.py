"""Everything that is known about an operator stands in one place."""

import operator

import pytest
import torch

from fxpass.ir import ops
from fxpass.ir.operators import OPERATORS, OpSpec, register, spec_of
from fxpass.passes.rules import RULES

aten = torch.ops.aten


def test_an_operator_in_two_tables_is_refused() -> None:
    with pytest.raises(ValueError, match=r"aten\.reshape\.default"):
        register({aten.reshape.default: OpSpec(free=True)})
    assert spec_of(aten.reshape.default).rule is RULES[aten.reshape.default]


def test_the_spec_of_an_unknown_operator_is_empty() -> None:
    assert spec_of(operator.add) == OpSpec()


def test_every_local_operator_is_registered_where_it_is_defined() -> None:
    assert ops.take in ops.LOCAL
    assert all(f.__module__ == ops.__name__ and f in OPERATORS for f in ops.LOCAL)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_regroup_takes_as_many_elements_as_the_shape_holds(rows: int) -> None:
    x = torch.arange(6.0 * rows).view(1, 3 * rows, 2)
    assert torch.equal(ops.regroup(x, 1, 3, rows, (1, rows, 5)), x.flatten()[rows : 6 * rows].view(1, rows, 5))
    one = torch.ones(1, 1)
    assert ops.regroup(one, 0, 2, 0, (1, 1, 1)).shape == (1, 1, 1)
