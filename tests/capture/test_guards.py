"""Values that a model reads from its inputs are guarded; numbers travel as tensors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxpass.capture import Call, GuardError, broken_guard, capture, guard_error
from fxpass.capture.evaluate import evaluate


class Model(nn.Module):
    def __init__(self, body: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.body = body

    def forward(self, x: Tensor, other: Any = None) -> Any:
        return self.body(self.linear(x), other)


MASK = torch.tensor([1, 1, 0, 1, 0])


@pytest.mark.parametrize(
    ("body", "first", "fits", "breaks"),
    [
        (lambda x, n: x[: int(n.max())], torch.tensor([2, 3]), torch.tensor([3, 0]), torch.tensor([2, 2])),
        (lambda x, n: x[n.bool()], MASK, 1 - MASK.roll(1) * 0 - (1 - MASK).roll(1), torch.ones(5)),
        (lambda x, n: x * 2 if n.sum() > 3 else x, torch.ones(5), torch.ones(5) * 7, torch.zeros(5)),
        (lambda x, n: x.split(n.tolist())[1], torch.tensor([2, 3]), torch.tensor([2, 3]), torch.tensor([1, 4])),
        (lambda x, n: x[list(n.numpy())], torch.tensor([2, 3]), torch.tensor([2, 3]), torch.tensor([1, 4])),
        (lambda x, n: torch.masked_select(x, n.bool()[:, None]), MASK, MASK.roll(1), torch.ones(5)),
        (lambda x, n: x[0] * n.unique().numel(), MASK, 1 - MASK, torch.ones(5, dtype=torch.int64)),
        (lambda x, n: x.repeat_interleave(n, dim=0), MASK, MASK.roll(2), MASK * 2),
        (lambda x, n: x if torch.equal(n, torch.ones(5)) else -x, torch.ones(5), torch.ones(5), torch.zeros(5)),
    ],
    ids=["int", "mask", "branch", "tolist", "numpy", "masked_select", "unique", "repeat_interleave", "equal"],
)
def test_a_value_read_from_an_input_is_guarded(body: Any, first: Tensor, fits: Tensor, breaks: Tensor) -> None:
    model = Model(body)
    program = capture(model, torch.randn(5, 4), first)
    assert {guard.path for guard in program.guards} == {"other"}
    assert "test_guards.py:" in program.guards[0].line
    for value in (first, fits):
        call = Call.of(model, (torch.randn(5, 4), value), {})
        assert broken_guard(program, model, call.tensors) is None
        with torch.no_grad():
            torch.testing.assert_close(evaluate(program, model, call), model(call.tensors[0], value))
    assert broken_guard(program, model, (torch.randn(5, 4), breaks)) is not None


def test_a_guard_survives_writes_in_place_before_the_value_is_read() -> None:
    def body(x: Tensor, n: Tensor) -> Tensor:
        total = torch.zeros(2, dtype=n.dtype)
        total[0] = n.sum()
        return x * total[0].item()

    model = Model(body)
    program = capture(model, torch.randn(5, 4), torch.tensor([2, 3]))
    assert broken_guard(program, model, (torch.randn(5, 4), torch.tensor([1, 4]))) is None
    assert broken_guard(program, model, (torch.randn(5, 4), torch.tensor([1, 5]))) is not None


@pytest.mark.parametrize("number", [5, 2.5])
def test_a_number_is_a_tensor_of_the_program(number: float) -> None:
    def body(x: Tensor, t: Any) -> Tensor:
        t = t if isinstance(t, Tensor) else torch.tensor([t])
        return x + torch.sin(t.float())

    model, x = Model(body), torch.randn(5, 4)
    program = capture(model, x, number)
    call = Call.of(model, (x, number + 1), {})
    assert program.guards == ()
    assert call.key == Call.of(model, (x, number), {}).key
    assert call.key != Call.of(model, (x, "text"), {}).key
    torch.testing.assert_close(evaluate(program, model, call), model(x, number + 1).detach())


@pytest.mark.parametrize(
    "body",
    [
        lambda x, t: x * math.sin(t),
        lambda x, t: x * (2 if isinstance(t, float) else t),
        lambda x, t: x * {0.5: 1}.get(t, 3),
    ],
    ids=["math", "isinstance", "lookup"],
)
def test_a_number_that_the_model_needs_as_such_is_guarded(body: Any) -> None:
    model, x = Model(body), torch.randn(5, 4)
    program = capture(model, x, 0.5)
    call, other = Call.of(model, (x, 0.5), {}), Call.of(model, (x, 0.6), {})
    assert broken_guard(program, model, call.tensors) is None
    torch.testing.assert_close(evaluate(program, model, call), model(x, 0.5).detach())
    guard = broken_guard(program, model, other.tensors)
    assert guard is not None
    with pytest.raises(GuardError, match="'other' into the Python value"):
        raise guard_error(guard)


@pytest.mark.parametrize(
    "layers",
    [lambda n: {3: 2}[n], lambda n: n.as_strided((), ()) if isinstance(n, Tensor) else n],
    ids=["refused where it runs", "refused where it is recorded"],
)
def test_numbers_beside_one_that_the_model_needs_as_such_are_not_guarded(layers: Any) -> None:
    model, x = Model(lambda x, given: x * layers(given["layers"]) + given["time"]), torch.randn(5, 4)
    program = capture(model, x, {"layers": 3, "time": 0.5, "id": 7})
    assert [guard.path for guard in program.guards] == ["other.layers"]
    given = {"layers": 3, "time": 0.7, "id": 8}
    call = Call.of(model, (x, given), {})
    assert broken_guard(program, model, call.tensors) is None
    torch.testing.assert_close(evaluate(program, model, call), model(x, given).detach())


def test_a_bool_is_part_of_the_key() -> None:
    model, x = Model(lambda x, flag: x if flag else -x), torch.randn(5, 4)
    assert Call.of(model, (x, True), {}).key != Call.of(model, (x, False), {}).key
    assert Call.of(model, (x, True), {}).key != Call.of(model, (x, 1), {}).key


def test_a_value_read_from_a_weight_is_guarded_too() -> None:
    model, x = Model(lambda x, other: x), torch.randn(5, 4)
    model.body = lambda x, other: x if model.linear.weight.sum() > 0 else -x
    program = capture(model, x)
    assert [guard.path for guard in program.guards] == ["linear.weight"]
    assert broken_guard(program, model, (x,)) is None
    with torch.no_grad():
        model.linear.weight.neg_()
    assert broken_guard(program, model, (x,)) is not None


def test_a_value_read_from_a_tensor_attribute_is_guarded_too() -> None:
    model: Any = Model(lambda x, other: x)
    x = torch.randn(5, 4)
    model.sign = torch.ones(())
    model.body = lambda x, other: x if model.sign > 0 else -x
    program = capture(model, x)
    assert [guard.path for guard in program.guards] == ["sign"]
    assert broken_guard(program, model, (x,)) is None
    model.sign.neg_()
    assert broken_guard(program, model, (x,)) is not None


def test_the_same_comparison_in_every_block_is_one_guard() -> None:
    def body(x: Tensor, mask: Tensor) -> Tensor:
        for _ in range(4):
            x = x * 2 if mask.all() else x
        return x

    assert len(capture(Model(body), torch.randn(5, 4), MASK.bool()).guards) == 1


def test_complex_numbers_are_captured() -> None:
    def body(x: Tensor, angle: Tensor) -> Tensor:
        turned = torch.view_as_complex(x.reshape(5, 2, 2)) * torch.polar(torch.ones(2), angle)
        return torch.view_as_real(turned).flatten(1)

    model, x = Model(body), torch.randn(5, 4)
    program = capture(model, x, torch.rand(2))
    angle = torch.rand(2)
    torch.testing.assert_close(evaluate(program, model, Call.of(model, (x, angle), {})), model(x, angle).detach())
