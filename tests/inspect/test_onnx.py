"""Step programs as ONNX models: the numbers of all ranks together, and what the files hold."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxpass.capture import Call
from fxpass.capture.structure import WeightTable
from fxpass.extras import MissingExtraError
from fxpass.inspect.onnx_model import Names, OnnxError, step_models
from fxpass.inspect.store import from_json
from fxpass.ir import ops
from fxpass.ir.layout import Rows
from fxpass.ir.step import EXACT, Step, StepProgram
from fxpass.ir.strategy import PRESETS
from fxpass.models.small import case, cases
from fxpass.passes.lower_comm import StepPrograms
from fxpass.plan import Plan, plan
from fxpass.runtime.lockstep import LockstepExecutor
from fxpass.runtime.step_runner import ContextState
from tests.inspect.onnx_ranks import Models, Ranks, as_array, models_of
from tests.inspect.plans import planned
from tests.runtime.plans import block, inputs, steps
from tests.tools.command import fxpass

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


SLOW = ("compressed", "full_sync", "separate_gn", "stale_gn", "sync_gn")


@pytest.mark.parametrize(
    "strategy", [pytest.param(each, marks=[pytest.mark.slow] if each in SLOW else []) for each in sorted(PRESETS)]
)
def test_all_ranks_together_compute_what_lockstep_does_with_every_strategy(strategy: str) -> None:
    made = planned(strategy, 2)
    outputs = follow(made, block(), models_of(made, modes()), steps(len(STEPS)))
    with torch.no_grad():
        whole = [block()(*each)["sample"] for each in steps(len(STEPS))]
    errors = [largest_error(found, [expected]) for found, expected in zip(outputs, whole, strict=True)]
    exact = made.strategy.exact
    assert all((error < ROUNDING) == (exact or step.exact) for error, step in zip(errors, STEPS, strict=True)), errors


FAST = ("dit", "sd3", "wan")


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


# -- files -------------------------------------------------------------------------------------------------------


def scopes(node: onnx.NodeProto) -> str:
    return next(each.value for each in node.metadata_props if each.key == "pkg.torch.onnx.name_scopes")


def test_a_file_is_a_valid_model_with_weights_and_state_as_inputs(tmp_path: Path) -> None:
    made = planned("displaced", 3)
    made.to_onnx(tmp_path / "new" / "rank1.onnx", 1, "steady")
    loaded = onnx.load(tmp_path / "new" / "rank1.onnx")
    onnx.checker.check_model(loaded, full_check=True)
    assert {each.domain: each.version for each in loaded.opset_import}[""] == 23
    names = [each.name for each in loaded.graph.input]
    assert {"sample", "timestep", "pace", "down.weight"} <= set(names)
    state = [name for name in names if name.startswith("state_")]
    outputs = [each.name for each in loaded.graph.output]
    assert state
    assert outputs == ["output_0", *(f"{name}.new" for name in state), "token"]


def test_modules_are_metadata_by_which_viewers_group_nodes(tmp_path: Path) -> None:
    planned().to_onnx(tmp_path / "model.onnx")
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    (strided,) = [node for node in nodes if node.op_type == "Conv" and "'down'" in scopes(node)]
    namespace = next(each.value for each in strided.metadata_props if each.key == "namespace")
    assert namespace.startswith(": Block/down: Conv2d/")
    assert any(node.op_type == "Put" and scopes(node).startswith("['', 'down', ") for node in nodes)


def test_puts_and_gets_have_an_order_and_say_what_they_carry(tmp_path: Path) -> None:
    planned().to_onnx(tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    messages = [node for node in graph.node if node.domain == "fxpass"]
    assert [node.input[0] for node in messages] == ["", *(node.output[0] for node in messages[:-1])]
    assert messages[-1].output[0] == graph.output[-1].name
    halo = next(node for node in messages if node.op_type == "Put" and "'conv_out'" in scopes(node))
    attributes = {each.name: onnx.helper.get_attribute_value(each) for each in halo.attribute}
    assert attributes["exchanges"] == [b"x3.0 0>1"]
    assert attributes["roles"] == [b"halo"]
    assert attributes["bytes"] == [1024]


def test_the_metadata_of_a_file_is_the_dump_without_nodes(tmp_path: Path) -> None:
    planned("displaced").to_onnx(tmp_path / "model.onnx", 1, "first")
    metadata = {each.key: each.value for each in onnx.load(tmp_path / "model.onnx").metadata_props}
    held, snapshot = from_json(metadata["fxpass.dump"]), planned("displaced").snapshot(1)
    assert (held.exchanges, held.messages, held.rank) == (snapshot.exchanges, snapshot.messages, 1)
    assert metadata["fxpass.mode"] == StepPrograms(planned("displaced").graph, 1).canonical("first")


def test_all_ranks_share_one_file_of_weights(tmp_path: Path) -> None:
    model = block()
    made = plan(model, *inputs(), world_size=1)
    made.to_onnx(tmp_path / "a.onnx", model=model)
    evaluator = ReferenceEvaluator(str(tmp_path / "a.onnx"))
    sample, timestep = inputs(seed=3)
    feeds = {"sample": as_array(sample), "timestep": as_array(timestep), "pace": torch.tensor(0.0).double().numpy()}
    outputs: Any = evaluator.run(None, feeds)
    found = torch.from_numpy(outputs[0])
    with torch.no_grad():
        torch.testing.assert_close(found, model(sample, timestep)["sample"])
    shared = (tmp_path / "weights.bin").read_bytes()
    made = plan(model, *inputs(), world_size=2)
    for rank in (0, 1):
        made.to_onnx(tmp_path / f"{rank}.onnx", rank, model=model)
        assert (tmp_path / "weights.bin").read_bytes() == shared
    assert sorted(each.name for each in tmp_path.iterdir()) == ["0.onnx", "1.onnx", "a.onnx", "weights.bin"]


def test_a_model_without_weights_has_them_as_inputs_only(tmp_path: Path) -> None:
    with FakeTensorMode():
        model, given = block(), inputs()
    made = plan(model, *given, world_size=2)
    made.to_onnx(tmp_path / "model.onnx")
    assert "conv_in.weight" in [each.name for each in onnx.load(tmp_path / "model.onnx").graph.input]
    with pytest.raises(ValueError, match="have no values"):
        made.to_onnx(tmp_path / "other.onnx", model=model)


# -- errors ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("fxpass_onnx_test::odd", mutates_args=())
def odd(x: Tensor) -> Tensor:
    return x * 3


odd.register_fake(torch.empty_like)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.inner = nn.Conv2d(4, 4, 3, padding=1), Calls()

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.inner(self.conv(sample)) * timestep


class Calls(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return odd(x)


def test_an_operator_without_an_onnx_form_is_named_in_one_line(tmp_path: Path) -> None:
    made = plan(Odd().eval(), *inputs(), world_size=2)
    with pytest.raises(
        OnnxError, match=r"^fxpass_onnx_test.odd.default has no ONNX form: .*\(odd_default in inner\)$"
    ) as error:
        made.to_onnx(tmp_path / "model.onnx")
    assert len(str(error.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: str) -> None:
        assert Path(path).exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx.checker, "check_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        planned().to_onnx(tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["folder/weights.bin", "/weights.bin", "..", "", "model.onnx"])
def test_weights_that_a_model_could_not_find_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weights"):
        planned().to_onnx(tmp_path / "model.onnx", model=block(), weights=name)
    assert not list(tmp_path.iterdir())


def test_weights_of_a_folder_are_those_that_lie_in_it(tmp_path: Path) -> None:
    model: Any = case("dit").build()
    model.save_pretrained(tmp_path / "dit")
    file = tmp_path / "model.onnx"
    result = fxpass("dump", tmp_path / "dit", "-n", 1, "-f", "onnx", "-o", file, "--weights", "w.bin")
    assert result.exit_code == 0, result.stderr
    held = {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(file).graph.initializer}
    for name, value in model.named_parameters():
        if name in held:
            torch.testing.assert_close(torch.from_numpy(held[name].astype("float32")), value.detach())
    assert len([name for name, _ in model.named_parameters() if name in held]) > 10


def test_an_unknown_mode_or_rank_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no mode 'stedy' of a step; there is: exact, first, steady"):
        planned().to_onnx(tmp_path / "model.onnx", mode="stedy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there is no rank 2"):
        planned().to_onnx(tmp_path / "model.onnx", 2)


@pytest.mark.parametrize("module", ["onnx", "onnxscript"])
def test_without_onnx_the_message_says_what_to_install(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf'{module} is not installed; run: pip install "fxpass\[onnx\]"'):
        planned().to_onnx(tmp_path / "model.onnx")
    result = fxpass("dump", "no-such-model", "--format", "onnx", "-o", tmp_path / "model.onnx")
    assert (result.exit_code, result.stderr) == (
        2,
        f'error: {module} is not installed; run: pip install "fxpass[onnx]"\n',
    )


def test_the_command_writes_a_model(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    made = ("dump", "tests.tools.models:good", "-n", 3, "--rank", 2, "--strategy", "displaced")
    assert fxpass(*made, "--format", "onnx", "--mode", "steady", "-o", file, "--weights", "w.bin").stdout == ""
    metadata = {each.key: each.value for each in onnx.load(file).metadata_props}
    assert metadata["fxpass.mode"].startswith("steady")
    assert from_json(metadata["fxpass.dump"]).rank == 2
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model.onnx", "w.bin"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-f", "onnx"), "give --output FILE"),
        (("-f", "onnx", "-o", "-"), "give --output FILE"),
        (("-f", "onnx", "-o", "m.onnx", "--mode", "stedy"), "did you mean 'steady'?"),
        (("-f", "onnx", "-o", "m.onnx", "--op", "linear"), "leave out --after"),
        (("-f", "onnx", "-o", "m.onnx", "--unfold"), "leave out --after"),
        (("--mode", "steady"), "are for --format onnx"),
        (("-f", "json", "--weights", "w.bin"), "are for --format onnx"),
        (("-f", "onnx", "-o", "m.onnx", "--weights", "folder/w.bin"), "give the name of a file, not 'folder/w.bin'"),
        (("-f", "onnx", "-o", "m.onnx", "--weights", "m.onnx"), "the model and its weights cannot both be the file"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_captured(words: tuple[str, ...], message: str) -> None:
    result = fxpass("dump", "no-such-model", *words)
    assert result.exit_code == 2
    assert re.search(re.escape(message), result.stderr)
    assert len(result.stderr.strip().splitlines()) == 1
