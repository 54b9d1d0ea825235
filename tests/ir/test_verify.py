"""A broken graph is refused, in the words of the rule that it breaks."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from fxpass.ir import ops
from fxpass.ir.fetch import Fetch
from fxpass.ir.layout import Layout, PerRank, full
from fxpass.ir.merge import Reduce
from fxpass.ir.verify import VerificationError, verify
from tests.passes.harness import cut

aten = torch.ops.aten
HALVES = cut(0, (0, 2), (2, 4))


def meta(shape: Any = (4, 3), dtype: Any = torch.float32, layout: Layout | None = None) -> dict[str, Any]:
    return {"shape": shape, "dtype": dtype} | ({} if layout is None else {"layout": layout})


def graph_of(build: Callable[[fx.Graph, fx.Node], fx.Node], layout: Layout | None = None) -> fx.Graph:
    """x [4, 3] -> what `build` adds."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta = meta(layout=layout)
    graph.output((build(graph, x),))
    return graph


def call(
    target: Any, *args: Any, layout: Layout | None = None, shape: Any = (4, 3)
) -> Callable[[fx.Graph, fx.Node], fx.Node]:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        node = graph.call_function(target, tuple(x if a is ... else a for a in args))
        node.meta = meta(shape, layout=layout)
        return node

    return build


def fetched(result: dict[str, Any] | None = None, **changes: Any) -> Callable[[fx.Graph, fx.Node], fx.Node]:
    declared: dict[str, Any] = {"role": "output", "shape": (4, 3), "dtype": torch.float32, "world": 2, "dim": 0}
    declared |= {"have": HALVES.rows, "want": full(4, 2)} | changes

    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        args: Any = ((x,), (Fetch(**declared),))
        node = graph.call_function(operator.getitem, (graph.call_function(ops.exchange, args), 0))
        node.meta = result or meta()
        return node

    return build


@pytest.mark.parametrize("stage", ["captured", "normal", "partitioned"])
def test_a_good_graph_passes(stage: Any) -> None:
    verify(graph_of(call(aten.relu.default, ...)), stage)


def test_a_good_exchange_passes() -> None:
    verify(graph_of(fetched(), HALVES), "partitioned", 2)


@pytest.mark.parametrize(
    ("stage", "build", "rule"),
    [
        ("captured", call(torch.relu, ...), "only ATen operators are called"),
        ("captured", call(aten.relu_.default, ...), "operators are functional"),
        ("captured", lambda g, x: g.call_method("relu", (x,)), "only ATen operators are called"),
        ("captured", call(aten.relu.default, ..., shape=("s0", 3)), "every shape is static"),
        ("normal", call(aten.view.default, ..., [4, 3]), "operators are in normal form"),
        ("normal", call(aten.conv2d.default, ..., ...), "operators are in normal form"),
        ("normal", call(ops.take, ..., 0, HALVES.rows[0]), "only ATen operators are called"),
        ("partitioned", call(torch.relu, ...), "only ATen's and the local operators are called"),
        ("partitioned", call(aten.relu.default, ..., layout=cut(0, (0, 4))), "layouts cover their dim"),
        ("partitioned", call(aten.relu.default, ..., layout=cut(0, (0, 2), (2, 5))), "layouts cover their dim"),
        ("partitioned", call(aten.relu.default, ..., layout=cut(0, (0, 2), (3, 4))), "layouts cover their dim"),
        ("partitioned", call(aten.add.Tensor, ..., PerRank((1, 2, 3))), "have a value for each"),
        ("partitioned", call(aten.expand.default, ..., [PerRank((4,)), 3]), "have a value for each"),
    ],
)
def test_a_broken_graph_is_refused(stage: Any, build: Any, rule: str) -> None:
    with pytest.raises(VerificationError, match=f"{stage}: not true that .*{rule}"):
        verify(graph_of(build), stage, 2)


def test_a_shape_without_a_dtype_is_refused() -> None:
    graph = graph_of(call(aten.relu.default, ...))
    del next(iter(graph.find_nodes(op="placeholder"))).meta["dtype"]
    with pytest.raises(VerificationError, match="comes with a dtype"):
        verify(graph, "captured")


@pytest.mark.parametrize(
    ("changes", "layout"),
    [
        ({"have": full(4, 2)}, HALVES),  # the operand is split
        ({}, None),  # the operand is whole
        ({}, cut(0, (0, 1), (1, 4))),  # it is cut elsewhere
        ({}, cut(1, (0, 2), (2, 3))),  # it is split along another dim
        ({"world": 3}, HALVES),
        ({"shape": (4, 4)}, HALVES),
        ({"dtype": torch.bfloat16}, HALVES),
    ],
)
def test_an_exchange_that_is_declared_for_another_operand_is_refused(
    changes: dict[str, Any], layout: Layout | None
) -> None:
    with pytest.raises(VerificationError, match="exchanges are declared for the layout of their operands"):
        verify(graph_of(fetched(**changes), layout), "partitioned", 2)


def test_a_value_with_holes_may_be_read_but_not_exchanged() -> None:
    def build(graph: fx.Graph, x: fx.Node, leaves: bool) -> fx.Node:
        rows = cut(0, (0, 2), (3, 4))
        part = call(ops.take, ..., 0, PerRank(rows.rows), layout=rows)(graph, x)
        part.meta["holes"] = True
        if leaves:
            return fetched(have=rows.rows, want=rows.rows, result=meta(layout=rows) | {"holes": True})(graph, part)
        return call(aten.sum.default, ..., shape=())(graph, part)

    verify(graph_of(lambda graph, x: build(graph, x, leaves=False)), "partitioned", 2)
    with pytest.raises(VerificationError, match="values with holes stay on their rank"):
        verify(graph_of(lambda graph, x: build(graph, x, leaves=True)), "partitioned", 2)


@pytest.mark.parametrize(
    "result", [meta((3, 3)), meta(dtype=torch.float64), meta(layout=HALVES), meta(layout=cut(0, (0, 4), (0, 3)))]
)
def test_a_result_that_an_exchange_does_not_make_is_refused(result: dict[str, Any]) -> None:
    with pytest.raises(VerificationError, match="results of exchanges have the declared shape"):
        verify(graph_of(fetched(result=result), HALVES), "partitioned", 2)


SHARED = cut(0, (0, 3), (2, 4))


@pytest.mark.parametrize(
    "owners",
    [
        (),  # either rank's row 2 would be taken
        SHARED.rows,
        cut(0, (0, 1), (1, 4)).rows,  # one does not have what it is to send
    ],
)
def test_a_gather_without_one_owner_for_each_row_is_refused(owners: Any) -> None:
    verify(graph_of(fetched(have=SHARED.rows, owners=HALVES.rows), SHARED), "partitioned", 2)
    with pytest.raises(VerificationError, match="comes from one owner per row"):
        verify(graph_of(fetched(have=SHARED.rows, owners=owners), SHARED), "partitioned", 2)


@pytest.mark.parametrize("role", ["realign", "rebalance", "small", "fallback", "output", "inputs"])
def test_a_rule_that_lets_other_roles_be_stale_is_refused(role: str) -> None:
    with pytest.raises(VerificationError, match="rules allow only real halos"):
        verify(graph_of(fetched(role=role, may_be_stale=True), HALVES), "partitioned", 2)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_a_rule_that_lets_other_than_real_numbers_be_stale_is_refused(dtype: torch.dtype) -> None:
    graph = graph_of(fetched(role="halo", dtype=dtype, may_be_stale=True, result=meta(dtype=dtype)), HALVES)
    graph.find_nodes(op="placeholder")[0].meta["dtype"] = dtype
    with pytest.raises(VerificationError, match="rules allow only real halos"):
        verify(graph, "partitioned", 2)


def test_a_stale_exchange_that_its_rule_does_not_allow_is_refused() -> None:
    verify(graph_of(fetched(role="halo", may_be_stale=True, fresh="stale"), HALVES), "displaced", 2)
    with pytest.raises(VerificationError, match="only what its rule allows is stale"):
        verify(graph_of(fetched(role="halo", fresh="stale"), HALVES), "displaced", 2)


def test_a_reduction_of_a_split_value_is_refused() -> None:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        args: Any = ((x,), (Reduce("sum", (4, 3), torch.float32, 2),))
        return graph.call_function(ops.exchange, args)

    with pytest.raises(VerificationError, match="exchanges are declared"):
        verify(graph_of(build, HALVES), "partitioned", 2)


def test_the_message_names_the_first_nodes() -> None:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        for _ in range(5):
            x = graph.call_function(torch.relu, (x,))
        return x

    with pytest.raises(VerificationError) as error:
        verify(graph_of(build), "captured")
    assert str(error.value).count("relu") >= 3
    assert "%relu_4" not in str(error.value)
