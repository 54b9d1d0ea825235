"""Trim computes replicated values only on the rows that each rank uses."""

from __future__ import annotations

import operator
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import fx

from fxpass.capture import capture
from fxpass.ir.layout import Layout, even
from fxpass.ir.program import calls, layout_of
from fxpass.passes.normalize import normalize
from fxpass.passes.partition import partition
from fxpass.passes.rules import RULES
from fxpass.passes.rules.views import _expanded
from fxpass.passes.trim import trim
from tests.passes.examples import randn
from tests.passes.harness import Function, evenly, layouts, split
from tests.properties import few, given

torch.manual_seed(0)  # the values below are the same whatever was imported before
W, V, K = randn(6, 6), randn(6), randn(2, 4, 6)
T = (2, 8, 6)
#: functions of a value [2, 8, 6] that is cut along dim 1 or 2, and of one of another shape that is not; along which
#: of these dims nothing stays whole
TRIMMED: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...]]] = {
    "pointwise": (lambda x, t: x * t.cos().exp(), T, (1, 2)),
    "a layer": (lambda x, t: x + F.silu(F.linear(F.silu(F.linear(t, W, V)), W)), T, (1,)),
    "an embedding of times": (lambda x, t: x + F.linear((t.reshape(16, 1) * V).sin(), W, V).reshape(T), (2, 8), (1,)),
    "modulation": (lambda x, t: (lambda s: x * s[:, :, 0] + s[:, :, 1])(t.reshape(2, 8, 2, 6).sin()), (2, 8, 12), (1,)),
    "a norm": (lambda x, t: x * F.layer_norm(t, (6,), V, V), T, (1,)),
    "a product": (lambda x, t: x + torch.matmul(t, W), T, (1,)),
    "queries": (lambda x, t: x + F.scaled_dot_product_attention(t, K, K), T, (1,)),
    "other dims": (lambda x, t: x + t.sin().permute(0, 2, 1), (2, 6, 8), (1, 2)),
    "expanded": (lambda x, t: x + F.linear(t.sin().expand(2, 8, 6), W), (2, 1, 6), (1,)),
    "joined": (lambda x, t: x + torch.cat([t.sin(), t.cos()], 2), (2, 8, 3), (1,)),
    "a table": (lambda x, t: x + F.embedding((t > 0).long(), W[:2]), (2, 8), (1,)),
    "softmax": (lambda x, t: x + t.softmax(2), T, (1,)),
}  # fmt: skip


def whole_values(graph: fx.Graph) -> list[str]:
    """What operators yield on every rank for all rows."""
    nodes = [n for n in calls(graph) if "shape" in n.meta and n.target is not operator.getitem]
    return [n.format_node() or "" for n in nodes if not layout_of(n).split and prod(n.meta["shape"]) >= 16]


@pytest.mark.parametrize(("name", "dim"), [(name, dim) for name, case in TRIMMED.items() for dim in case[2]])
@few
@given(data=st.data())
def test_values_of_which_ranks_use_only_rows_are_computed_on_those_rows(
    name: str, dim: int, data: st.DataObject
) -> None:
    function, shape, _ = TRIMMED[name]
    layout = data.draw(layouts(T, 2, dims=(dim,), kinds="uneven strided any"))  # overlaps may be everything
    graph = split(function, (randn(*T), randn(*shape)), {0: layout}, 2).graph
    assert not whole_values(graph)


def test_a_value_that_is_also_used_whole_stays_whole() -> None:
    def function(x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        t = F.linear(t, W)
        return x + t.sin(), t

    found = split(function, (randn(*T), randn(*T)), {0: evenly(1, 8, 2)}, 2, exact=False)
    (layer,) = [n for n in calls(found.graph) if n.target is torch.ops.aten.linear.default]
    (sine,) = [n for n in calls(found.graph) if n.target is torch.ops.aten.sin.default]
    assert not layout_of(layer).split
    assert layout_of(sine).split


def test_rows_taken_twice_are_computed_once() -> None:
    kernel = randn(6, 6, 3)

    def function(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        t = F.linear(t, W)
        return x + t + F.conv1d((x + t.sin()).permute(0, 2, 1), kernel, padding=1).permute(0, 2, 1)

    found = split(function, (randn(*T), randn(*T)), {0: evenly(1, 8, 2)}, 2)
    layers = [n for n in calls(found.graph) if n.target is torch.ops.aten.linear.default]
    assert [layout_of(n) for n in layers] == [evenly(1, 8, 2)]


def test_columns_of_a_table_that_is_looked_up_whole_are_right() -> None:
    columns = evenly(2, 6, 2)
    split(lambda x, t: x + F.embedding((t > 0).long(), W[:2]), (randn(*T), randn(2, 8)), {0: columns}, 2, exact=False)


def test_the_graph_that_is_trimmed_is_left_as_it_was() -> None:
    program = normalize(capture(Function(lambda x, t: x * F.linear(t, W).cos().exp()), randn(*T), randn(*T)))
    graph = partition(program.graph, 2, {program.inputs[0]: evenly(1, 8, 2)}, RULES)
    before = str(graph)
    trimmed = trim(graph, program.graph, 2, RULES)
    assert whole_values(graph)
    assert not whole_values(trimmed)
    assert str(graph) == before


@pytest.mark.parametrize(("dim", "there"), [(0, None), (1, 0), (2, 1), (3, None)])
def test_the_rows_of_an_expanded_value_are_those_of_its_operand_where_it_has_them(dim: int, there: int | None) -> None:
    graph = fx.Graph()
    operand = graph.placeholder("x")
    operand.meta["shape"] = (6, 4, 1)
    value = graph.call_function(torch.ops.aten.expand.default, (operand, [6, 6, 4, 5]))
    value.meta["shape"] = (6, 6, 4, 5)
    wanted = Layout(dim, even(value.meta["shape"][dim], 2))
    (found,) = _expanded(value, wanted)
    assert found == ({} if there is None else {operand: wanted.at(there)})
