"""Ranks in one process: exact, in step, and every corrupted message changes the output."""

import operator
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fxpass.capture import capture
from fxpass.capture.structure import WeightTable
from fxpass.ir.exchange import Exchange
from fxpass.ir.program import exchanges_of
from fxpass.ir.step import StepProgram
from fxpass.passes.codegen import step_code
from fxpass.runtime.lockstep import LockstepExecutor
from fxpass.runtime.step_runner import drive
from tests.runtime.plans import CutPlan, block, broken_on_rank_1, cut_plan, inputs, parallel, whole

aten = torch.ops.aten


@pytest.fixture(scope="module")
def plan() -> CutPlan:
    return cut_plan(capture(block(), *inputs()), 3)


def run(plan: CutPlan, executor: LockstepExecutor, seed: int = 0) -> list[list[Tensor]]:
    weights = WeightTable(block(), list(plan.program.weights.values())).tensors()
    with torch.no_grad():
        return executor.load(plan, weights, inputs(seed=seed)).run_all(weights, inputs(seed=seed))


@pytest.mark.parametrize(("world", "rows"), [(1, 16), (2, 16), (3, 16), (3, 22)])
def test_lockstep_equals_the_whole_model(world: int, rows: int) -> None:
    model = block()
    module = parallel(model, LockstepExecutor(world, check=True))
    for seed in (0, 1):
        sample, timestep = inputs(rows, seed)
        torch.testing.assert_close(module(sample, timestep)["sample"], whole(model, sample, timestep))


def test_one_rank_computes_what_the_model_computes_bit_for_bit() -> None:
    model = block()
    assert torch.equal(parallel(model, LockstepExecutor(1))(*inputs())["sample"], whole(model, *inputs()))


def test_every_rank_returns_the_same_whole_output(plan: CutPlan) -> None:
    first, *others = run(plan, LockstepExecutor(3))
    assert all(torch.equal(first[0], other[0]) for other in others)


def test_corrupting_any_exchange_changes_the_output(plan: CutPlan) -> None:
    expected = run(plan, LockstepExecutor(3))
    nodes = {node.name for node, _ in exchanges_of(plan.graph)}
    assert len(nodes) >= 5
    for name in nodes:

        def corrupt(node: str, exchange: Exchange, src: int, dst: int, payload: Tensor, name: str = name) -> Tensor:
            return payload + 1 if node == name else payload

        found = run(plan, LockstepExecutor(3, tamper=corrupt))
        assert any(not torch.equal(a[0], b[0]) for a, b in zip(found, expected, strict=True)), f"{name} is not used"


def test_traffic_is_what_the_plan_declares(plan: CutPlan) -> None:
    executor = LockstepExecutor(3)
    run(plan, executor)
    for role in ("halo", "moments", "keys_values", "output"):
        declared = sum(e.received(0) for _, some in exchanges_of(plan.graph) for e in some if e.role == role)
        assert executor.traffic[role] == declared > 0


def test_an_error_says_at_which_node_module_and_rank(plan: CutPlan) -> None:
    with pytest.raises(RuntimeError) as error:
        run(broken_on_rank_1(plan), LockstepExecutor(3))
    assert any("rank 1" in note and "reshape" in note for note in error.value.__notes__)


def test_a_value_of_another_shape_than_its_layout_is_reported(plan: CutPlan) -> None:
    graph = type(plan.graph)()
    graph.output(graph.graph_copy(plan.graph, {}))
    node = next(n for n in graph.nodes if n.target is operator.getitem)
    node.meta["shape"] = (1, 1, 1, 1)
    with pytest.raises(AssertionError, match="its layout says"):
        run(CutPlan(plan.program, graph, 3, ""), LockstepExecutor(3, check=True))


def test_values_are_freed_after_their_last_use() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    for _ in range(5):
        x = graph.call_function(torch.ops.aten.add.Tensor, (x, 1.0))
    x.meta["path"] = "mid.block"
    graph.output(([x], []))
    code = step_code(StepProgram(0, "exact", graph, (), ()))
    assert len(re.findall(r"del v\d", code.source)) == 5  # all but what is returned
    assert "mid.block" in code.lines[-4]
    (outputs, _) = drive(code.run([torch.zeros(2)]), [])
    assert outputs[0].tolist() == [5.0, 5.0]


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("view", [aten.view_as_complex.default, aten.view.dtype])
def test_values_are_viewed_as_another_dtype_in_whatever_order_they_lie_in_memory(view: Any, segmented: bool) -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    more = () if view is aten.view_as_complex.default else (torch.int16,)
    graph.output(([graph.call_function(view, (x, *more))], []))
    code = step_code(StepProgram(0, "exact", graph, (), ()), segmented=segmented)
    values = torch.randn(3, 8, 2)
    for lies in (values, values.mT.contiguous().mT, torch.randn(3, 8, 4)[..., 1:3], torch.randn(3, 8, 4)[..., ::2]):
        compiled = {name: segment.function() for name, segment in code.segments.items()}
        (found,), _ = drive(code.run([lies], compiled), [])
        assert torch.equal(found, view(lies.contiguous(), *more))
