"""Step programs as ONNX models: the numbers of all ranks together, and what the files hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, fx

from fxpass.capture import Call
from fxpass.capture.structure import WeightTable
from fxpass.inspect.onnx_model import Names, step_models
from fxpass.ir import ops
from fxpass.ir.layout import Rows
from fxpass.ir.step import EXACT, Step, StepProgram
from fxpass.ir.strategy import PRESETS
from fxpass.make_plan import plan
from fxpass.models.small import case, cases
from fxpass.plan import Plan
from fxpass.runtime.lockstep import LockstepExecutor
from fxpass.runtime.step_runner import ContextState
from tests.inspect.onnx_ranks import Models, Ranks, as_array, models_of
from tests.inspect.plans import planned
from tests.runtime.plans import block, steps

STALE = Step(exact=False, pace=0.9)
STEPS = [EXACT, STALE, STALE, STALE, EXACT, STALE]
ROUNDING = 1e-5  #: of the largest value
aten = torch.ops.aten


def modes() -> list[Any]:
    context = ContextState()
    return list(dict.fromkeys(context.next(step) for step in STEPS))


def largest_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def follow(made: Plan, model: Any, models: Models, given: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Run `STEPS` in onnx and in torch, and compare each; returns the outputs of rank 0."""
    weights = WeightTable(model, list(made.program.weights.values())).tensors()
    lockstep = LockstepExecutor(made.world_size).load(made, weights, given[0])
    ranks = Ranks(made, model, models)
    outputs: list[list[Tensor]] = []
    for number, (step, tensors) in enumerate(zip(STEPS, given, strict=True)):
        with torch.no_grad():
            expected = lockstep.run_all(weights, tensors, step)
        found = ranks.run(tensors, step)
        for rank in range(made.world_size):
            error = largest_error(found[rank], expected[rank])
            assert error < ROUNDING, f"step {number} of rank {rank} is {error:.1e} off"
        outputs.append(found[0])
    return outputs


PATCHED = sorted(name for name, strategy in PRESETS.items() if not strategy.overlaps)
SLOW = ("compressed", "full_sync", "no_sync", "separate_gn", "stale_gn", "sync_gn")


@pytest.mark.parametrize(
    "strategy", [pytest.param(each, marks=[pytest.mark.slow] if each in SLOW else []) for each in PATCHED]
)
def test_all_ranks_together_compute_what_lockstep_does_with_every_strategy(strategy: str) -> None:
    made = planned(strategy, 2)
    outputs = follow(made, block(), models_of(made, modes()), steps(len(STEPS)))
    with torch.no_grad():
        whole = [block()(*each)["sample"] for each in steps(len(STEPS))]
    errors = [largest_error(found, [expected]) for found, expected in zip(outputs, whole, strict=True)]
    exact = made.strategy.exact
    assert all((error < ROUNDING) == (exact or step.exact) for error, step in zip(errors, STEPS, strict=True)), errors


FAST = ("wan",)


@pytest.mark.parametrize(
    "name", [pytest.param(each.name, marks=[] if each.name in FAST else pytest.mark.slow) for each in cases]
)
def test_all_ranks_of_a_model_together_compute_what_lockstep_does(name: str) -> None:
    model: Any = case(name).build()
    given = case(name).inputs(rows=16, seed=0, module=model)
    made = plan(model, **given, world_size=2, strategy="displaced")
    generator = torch.Generator().manual_seed(1)

    def moved(x: Tensor, by: float) -> Tensor:
        still = not x.dtype.is_floating_point or x.ndim < 3
        return x if still else x + by * torch.randn(x.shape, generator=generator, dtype=x.dtype)

    tensors = Call.of(model, (), given).tensors
    follow(made, model, models_of(made, modes()), [[moved(x, 0.05 * k) for x in tensors] for k in range(len(STEPS))])


def test_corrupting_a_get_changes_the_output() -> None:
    made = planned("displaced", 3)
    models = models_of(made, modes())

    def outputs(tamper: Callable[[str, Any], Any] | None = None) -> list[list[list[Tensor]]]:
        ranks = Ranks(made, block(), models, tamper)
        return [ranks.run(given, step) for given, step in zip(steps(4), STEPS, strict=False)]

    def differ(found: list[list[Tensor]], expected: list[list[Tensor]]) -> bool:
        return any(not torch.equal(a[0], b[0]) for a, b in zip(found, expected, strict=True))

    expected = outputs()
    assert not any(map(differ, outputs(), expected))
    for each in made.exchanges:
        routes = [route(each.id, src, dst) for src in range(3) for dst in range(3) if each.declared.numel(src, dst)]
        assert routes
        for name in routes:
            found = outputs(lambda there, payload, name=name: payload + 1 if there == name else payload)
            assert differ(found[0], expected[0]), f"{name} is not used by an exact step"
            assert differ(found[3], expected[3]), f"{name} is not used by a displaced step"


def route(identifier: str, src: int, dst: int) -> str:
    return f"{identifier} {src}>{dst}"


# -- operators ---------------------------------------------------------------------------------------------------

X = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
ROWS = Rows.of([0, 2, 3])
EXAMPLES: dict[Callable[..., Any], tuple[Any, ...]] = {
    ops.take: (X, 2, ROWS),
    ops.select: (X, 2, ops.Index(torch.tensor([5, 0, 0]).numpy())),
    ops.regroup: (X, 1, 3, 6, (2, 6)),
    ops.resample: (X, 2, ops.Index(torch.tensor([0, 1, 1, 2]).numpy()), ((0.5, 0.25), (0.5, 0.75))),
    ops.moments: (X, [2]),
    ops.write_rows: (aten.index_add.default, ROWS, 8, X[:, :, :3], 2, torch.tensor([2, 7, -8]), X[:, :, 3:]),
    ops.put_rows: (ROWS, 8, 2, X[:, :, :3], [None, None, torch.tensor([2, 7])], X[:, :, :2], False),
    ops.rows_of: (aten.silu.default, 2, ROWS, X),
    ops.exponentials: (X, [2]),
    ops.group_moments: (X, 2),
    ops.group_normalize: (X, ops.group_moments(X, 2).abs(), 2, X[0, :, 0], X[0, :, 1], 1e-5),
    ops.causal_mask: (ROWS, 5, X),
    ops.seen: (X > 0, X[:, :3], ROWS),
}
COMMUNICATE = {ops.exchange, ops.wait}


def in_onnx(calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Tensor]:
    """The results of calls, each a tensor, by onnx."""
    graph = fx.Graph()
    given: list[Tensor] = []

    def placeholder(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        node = graph.placeholder(f"x{len(given)}")
        node.meta |= {"shape": tuple(x.shape), "dtype": x.dtype}
        given.append(x)
        return node

    arguments = [fx.node.map_aggregate(args, placeholder) for _, args in calls]
    outputs = [graph.call_function(f, args) for (f, _), args in zip(calls, arguments, strict=True)]
    graph.output((outputs, []))
    (model,) = step_models([StepProgram(0, "exact", graph, (), ())], Names({}, [], {}), {})
    feeds = {f"x{i}": as_array(x) for i, x in enumerate(given)}
    return [torch.from_numpy(x) for x in ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)]


def test_every_local_operator_is_translated_to_onnx_and_computes_the_same() -> None:
    assert EXAMPLES.keys() == ops.LOCAL - COMMUNICATE, "give each local operator an example"
    for (function, args), found in zip(EXAMPLES.items(), in_onnx([*EXAMPLES.items()]), strict=True):
        torch.testing.assert_close(found, function(*args), msg=lambda text, f=function: f"{f.__name__}: {text}")


def as_bytes(x: Tensor) -> Tensor:
    return x.bfloat16().view(torch.uint8)


def as_numbers(x: Tensor) -> Tensor:
    return x.view(torch.bfloat16).float()


def test_bfloat16_numbers_become_bytes_and_bytes_numbers_exactly() -> None:
    codes = torch.arange(1 << 16).to(torch.uint16).view(torch.uint8)
    numbers = as_numbers(codes)
    (seen,) = in_onnx([(as_numbers, (codes,))])
    assert torch.equal(seen.isnan(), numbers.isnan())
    assert torch.equal(seen[~seen.isnan()], numbers[~seen.isnan()])
    with np.errstate(invalid="ignore"):  # the evaluator casts numbers that are none
        (back,) = in_onnx([(as_bytes, (numbers,))])
    same, pairs = (back.view(-1, 2) == codes.view(-1, 2)).all(-1), codes.view(-1, 2)
    negative_zero = (pairs[:, 0] == 0) & (pairs[:, 1] == 128)
    assert torch.equal(same[~numbers.isnan()], ~negative_zero[~numbers.isnan()])  # which becomes 0
    assert as_numbers(back.contiguous())[numbers.isnan()].isnan().all()


def attention(heads: tuple[int, ...], masked: int | None) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A call of attention of tensors [*heads, 5, 8], with a mask of the last `masked` dims of the scores."""
    generator = torch.Generator().manual_seed(len(heads))
    q, k, v = (torch.randn(*heads, rows, 8, generator=generator) for rows in (5, 7, 7))
    mask = None if masked is None else torch.randn((*heads, 5, 7)[-masked:], generator=generator) > -1
    return aten.scaled_dot_product_attention.default, (q, k, v, mask)


def test_attention_has_any_number_of_dims() -> None:
    shapes = [((), None), ((3,), 2), ((3,), 3), ((2, 3), 4), ((2, 3, 4), None), ((2, 3, 4), 3), ((2, 3, 4), 5)]
    calls = [attention(*each) for each in shapes]
    for (function, args), found in zip(calls, in_onnx(calls), strict=True):
        torch.testing.assert_close(found, function(*args))


def test_bits_are_shifted_and_numbers_are_clamped_as_in_torch() -> None:
    codes = torch.arange(256).to(torch.uint8)
    signed, half = codes.to(torch.int8), torch.linspace(0, 3, 7).half()
    calls: list[Any] = [
        (aten.__rshift__.Scalar, (codes, 3)),
        (aten.__lshift__.Scalar, (codes, 3)),
        (aten.__rshift__.Scalar, (signed, 3)),
        (aten.__rshift__.Tensor, (codes, codes % 8)),
        (aten.clamp.default, (half, 0.5, 2)),
        (aten.clamp.default, (half, None, 2)),
    ]
    for (function, args), found in zip(calls, in_onnx(calls), strict=True):
        assert torch.equal(found, function(*args)), function
