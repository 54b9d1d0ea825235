"""normalize: the same values by fewer kinds of operators."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import pad_sequence

from fxpass.capture import Call, capture
from fxpass.capture.evaluate import evaluate
from fxpass.ir.operators import OPERATORS
from fxpass.ir.program import calls
from fxpass.ir.verify import verify
from fxpass.passes.normalize import normalize
from tests.passes.harness import Function, assert_equal

aten = torch.ops.aten
#: forms that may stay what they are
KEPT = {
    aten.reshape.default, aten.permute.default, aten.expand.default, aten.slice.Tensor, aten.cat.default,
    aten.slice_scatter.default, aten._to_copy.default, aten.pad.default, aten.constant_pad_nd.default,
    aten.einsum.default, aten.clone.default, aten.var.correction, aten.var_mean.correction,
}  # fmt: skip


def words(graph: fx.Graph) -> set[Any]:
    return {node.target for node in calls(graph)}


def normalized(function: Any, *inputs: Any) -> set[Any]:
    """Check that nothing but the words changed; returns them."""
    model = function if isinstance(function, nn.Module) else Function(function)
    before = capture(model.eval(), *inputs)
    after = normalize(before)
    verify(after.graph, "normal")
    assert len(list(calls(after.graph))) <= 4 * len(list(calls(before.graph)))
    fresh = [torch.randn_like(x) if x.is_floating_point() else x for x in inputs if isinstance(x, Tensor)]
    one, other = (evaluate(program, model, Call.of(model, fresh, {})) for program in (before, after))
    flat = [[x] if isinstance(x, Tensor) else list(x) for x in (one, other)]
    assert_equal(flat[1], flat[0], "normalized")
    found = words(after.graph)
    assert not found & ({op for op, spec in OPERATORS.items() if spec.form} - KEPT)
    return found


x = torch.randn(2, 4, 6, 8, dtype=torch.float64)
R, P, E, S, C = aten.reshape.default, aten.permute.default, aten.expand.default, aten.slice.Tensor, aten.cat.default


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.view(2, 24, 8), {R}),
        (lambda x: x.flatten(1), {R}),
        (lambda x: x.unflatten(1, (2, 2)), {R}),
        (lambda x: x.unsqueeze(0).squeeze(0) + 1, {R, aten.add.Tensor}),
        (lambda x: x.transpose(1, -1) * 1, {P, aten.mul.Tensor}),
        (lambda x: x[0, 0].t() * 1, {S, R, P, aten.mul.Tensor}),
        (lambda x: x.permute(0, 1, 2, 3) * 1, {aten.mul.Tensor}),
        (lambda x: x.select(1, -1) * 1, {S, R, aten.mul.Tensor}),
        (lambda x: [y * 1 for y in x.unbind(1)], {S, R, aten.mul.Tensor}),
        (lambda x: [y * 1 for y in x.chunk(3, 2)], {S, aten.mul.Tensor}),
        (lambda x: [y * 1 for y in x.split([1, 7], -1)], {S, aten.mul.Tensor}),
        (lambda x: x.narrow(-1, 2, 3) * 1, {S, aten.mul.Tensor}),
        (lambda x: x[:, :, -3:-1] * 1, {S, aten.mul.Tensor}),
        (lambda x: x[:, :, 0:100] * 1, {aten.mul.Tensor}),
        (lambda x: torch.stack([x, x * 2], 1), {R, C, aten.mul.Tensor}),
        (lambda x: torch.cat([x, x[:, :0]], 1) * 1, None),
        (lambda x: torch.cat([torch.zeros(0, dtype=x.dtype), x * 1]), None),
        (lambda x: x.repeat(1, 2, 1, 1), {R, E}),
        (lambda x: x.repeat(3, 1, 1, 1, 2), {R, E}),
        (lambda x: x.repeat_interleave(2, 1), {R, E}),
        (lambda x: x.repeat_interleave(2), {R, E}),
        (lambda x: x.tile(2, 1), None),
        (lambda x: F.pixel_shuffle(x, 2), {R, P}),
        (lambda x: F.pixel_unshuffle(x, 2), {R, P}),
        (lambda x: x.clone().contiguous().detach() * 1, {aten.mul.Tensor}),
        (lambda x: x.to(torch.float64) * 1, {aten.mul.Tensor}),
        (lambda x: x.type_as(x.float()), {aten._to_copy.default}),
        (lambda x: torch.slice_scatter(x, x[:, :2], 1, 1, 3), {S, C}),
        (lambda x: torch.select_scatter(x, x[:, 0], 1, 2), {S, R, C}),
        (lambda x: torch.cat([x[:0], x.float()]), {aten._to_copy.default}),
        (lambda x: torch.cat([torch.zeros(0), x[:0]], 1), None),
        (lambda x: F.pad(x, (1, 1, 0, 2)), {aten.constant_pad_nd.default}),
        (lambda x: F.pad(x, (0, 0)) * 1, {aten.mul.Tensor}),
        (lambda x: F.pad(x, (1, 1, 2, 2), mode="reflect"), {aten.pad.default}),
        (lambda x: torch.einsum("abcd->dcab", x) * 1, {P, aten.mul.Tensor}),
        (lambda x: torch.einsum("a...->...a", x) * 1, {P, aten.mul.Tensor}),
        (lambda x: torch.einsum("dabc", x) * 1, {P, aten.mul.Tensor}),
        (lambda x: pad_sequence([x[0], x[1, :2]], padding_value=2.0), None),
        (lambda x: pad_sequence([x[0], x[1, :2]], batch_first=True, padding_side="left"), None),
        (lambda x: x.take_along_dim(x.argsort(1), 1), None),
        (lambda x: x.take_along_dim(x[:, :1].argsort(0), 0), None),
        (lambda x: F.interpolate(x, scale_factor=2.0), {aten.upsample_nearest2d.default}),
        (lambda x: F.interpolate(x, size=(5, 5), mode="bicubic"), {aten.upsample_bicubic2d.default}),
        (
            lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True),
            {aten._upsample_bilinear2d_aa.default},
        ),
        (lambda x: (x.std(1), x.std(), x.var(1, unbiased=False)), {aten.var.correction, aten.sqrt.default}),
        (
            lambda x: torch.std_mean(x, (1, 2), keepdim=True),
            {aten.var_mean.correction, operator.getitem, aten.sqrt.default},
        ),
        (F.instance_norm, {aten.group_norm.default}),
    ],
)
def test_each_form_keeps_the_numbers(function: Any, expected: set[Any] | None) -> None:
    found = normalized(function, x)
    assert expected is None or found == expected


@pytest.mark.parametrize("name", ["var", "std", "var_mean", "std_mean"])
def test_every_form_of_a_variance_keeps_the_numbers(name: str) -> None:
    op = getattr(aten, name)

    def function(x: Tensor) -> list[Tensor]:
        results = (op.default(x, False), op.default(x), op.dim(x, [1, 3]), op.correction(x, [1], correction=2))
        return [y for result in results for y in (result if isinstance(result, tuple) else [result])]

    normalized(function, x)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv1d(4, 4, 3, padding="same", dilation=2), (2, 4, 9)),
        (nn.Conv1d(4, 4, 4, padding="same"), (4, 9)),
        (nn.Conv2d(4, 6, 3, 2, 1, groups=2, bias=False), (2, 4, 9, 7)),
        (nn.Conv2d(4, 4, 3, padding="valid"), (4, 9, 7)),
        (nn.Conv2d(4, 4, (2, 4), padding="same"), (2, 4, 9, 7)),
        (nn.Conv3d(4, 4, 3, padding=(1, 0, 2)), (2, 4, 5, 6, 7)),
        (nn.ConvTranspose1d(4, 4, 4, 2, 1), (2, 4, 9)),
        (nn.ConvTranspose2d(4, 4, 3, 2, output_padding=1, groups=2), (2, 4, 9, 7)),
        (nn.ConvTranspose3d(4, 4, 2, 2), (4, 3, 4, 5)),
    ],
    ids=str,
)
def test_all_forms_of_convolution_become_one_operator(module: nn.Module, shape: tuple[int, ...]) -> None:
    found = normalized(module.double(), torch.randn(shape, dtype=torch.float64))
    assert found <= {aten.convolution.default, aten.constant_pad_nd.default, R}


def test_a_batch_norm_in_use_has_one_result() -> None:
    assert normalized(nn.BatchNorm2d(4).double(), x) == {aten.batch_norm.default}


def test_values_that_depend_on_no_input_are_computed_once() -> None:
    def function(x: Tensor) -> Tensor:
        position = torch.arange(8, dtype=x.dtype)[None] / torch.arange(1, 7, dtype=x.dtype)[:, None]
        return x + position.sin().cos()

    program = normalize(capture(Function(function), x))
    assert words(program.graph) == {aten.add.Tensor}
    (constant,) = program.constants.values()
    assert constant.shape == (6, 8)


def test_values_that_depend_on_weights_are_not_folded() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight.exp()

    program = normalize(capture(Model(), torch.randn(2, 8)))
    assert aten.exp.default in words(program.graph)
    assert list(program.weights.values()) == ["weight"]


def test_dead_code_and_its_operands_are_removed() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            self.unused(x)
            return self.used(x)

    program = normalize(capture(Model(), torch.randn(2, 8), torch.randn(3)))
    assert set(program.weights.values()) == {"used.weight", "used.bias"}
    assert len(program.inputs) == 2  # an input stays, used or not
    assert words(program.graph) == {aten.linear.default}


def test_the_captured_program_is_left_as_it_is() -> None:
    program = capture(Function(lambda x: x.view(2, -1) * 1), x)
    before = str(program.graph)
    normalize(program)
    assert str(program.graph) == before
    assert normalize(program).graph is not program.graph


def test_equal_operators_on_equal_operands_are_merged() -> None:
    kernel = torch.randn(4, 4, 3, 3, dtype=torch.float64)

    def function(x: Tensor) -> Tensor:
        return F.conv2d(x, kernel, padding=1).relu() - F.conv2d(x.contiguous(), kernel, padding=(1, 1))

    program = normalize(capture(Function(function), x))
    assert [node.target for node in calls(program.graph)].count(aten.convolution.default) == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x.clamp(min=0.0), x.clamp(min=-0.0)),
        lambda x: (x.sum(1, keepdim=True), x.sum(1, keepdim=False)),
        lambda x: (x + 1, x + 2),
        lambda x: (x - x.sin(), x.sin() - x),
    ],
)
def test_operators_that_differ_in_an_argument_are_not_merged(function: Any) -> None:
    program = normalize(capture(Function(function), x))
    (output,) = program.graph.find_nodes(op="output")
    assert output.args[0][0] is not output.args[0][1]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x.sin() * 2, x.sin() * 2),
        lambda x: (x.sin(), x.sin().flatten()),
        lambda x: (y := x.sin(), y.clone()),
        lambda x: (x.clone(), x.clone()[:1]),
    ],
)
def test_results_share_memory_with_nothing_that_the_model_keeps_apart(function: Any) -> None:
    model = Function(function)
    given = x.clone()
    one, other = evaluate(normalize(capture(model, x)), model, Call.of(model, [given], {}))
    expected = other.clone()
    one.fill_(7)
    given.fill_(7)
    assert torch.equal(other, expected)


def test_a_result_that_is_a_view_of_another_is_not_copied() -> None:
    program = normalize(capture(Function(lambda x: (y := x.sin(), y.flatten(), *y.chunk(2, 1), x[:1])), x))
    assert aten.clone.default not in words(program.graph)
