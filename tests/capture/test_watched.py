"""Python state that the forward reads is watched: after a change the model's new output is given."""

from __future__ import annotations

import functools
import gc
import itertools
import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxpass

SCALE = 1.0
OPTIONS = {"scale": [1.0]}
TABLE = np.ones(6)
SHIFT = torch.zeros(6)


class Config:
    scale = 1.0


SETTINGS = SimpleNamespace(inner=Config())


class Model(nn.Module):
    def __init__(self, body: Callable[..., Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.body = body
        self.array = np.ones(6, dtype=np.float32)

    def forward(self, x: Tensor, apply: Any = None) -> Tensor:
        h = self.linear(x)
        h = self.body(self, h)
        return h if apply is None else apply(h)


def scaled_by(number: float) -> float:
    return number * SCALE


class Scaler:
    def __init__(self) -> None:
        self.factors = [1.0]

    def scaled(self, h: Tensor) -> Tensor:
        return h * self.factors[0]


def check(model: nn.Module, change: Callable[[], None], *others: Any) -> None:
    """The output follows a change, and a call without one captures nothing."""
    module: Any = fxpass.parallelize(model.eval(), 2, executor="lockstep")
    x = torch.randn(1, 8, 6)
    with torch.no_grad():
        before = module(x, *others)
        torch.testing.assert_close(before, model(x, *others))
        module(x + 1, *others)
        assert module._engine.programs.in_a_row == 0
        change()
        expected = model(x, *others)
        torch.testing.assert_close(module(x, *others), expected)
        assert (before - expected).abs().max() > 1e-2
        module(x + 1, *others)
        assert module._engine.programs.in_a_row == 0


def test_a_variable_of_a_function_in_an_attribute() -> None:
    k = [2.0]
    check(Model(lambda m, h: h * k[0]), lambda: k.__setitem__(0, 3.0))


def test_a_variable_that_a_closure_rebinds() -> None:
    k = 2.0

    def change() -> None:
        nonlocal k
        k = 3.0

    check(Model(lambda m, h: h * k), change)


def test_a_variable_of_a_frozen_function_that_an_iterator_holds() -> None:
    k = [2.0]

    def scaled(h: Tensor) -> Tensor:
        return h * k[0]

    def change() -> None:
        nonlocal k
        k = [3.0]

    functions = itertools.repeat(scaled)
    del scaled
    model = Model(lambda m, h: next(functions)(h))
    gc.freeze()
    check(model, change)
    gc.unfreeze()


def test_a_variable_of_a_function_given_as_an_argument() -> None:
    k = [2.0]
    check(Model(lambda m, h: h), lambda: k.__setitem__(0, 3.0), lambda h: h * k[0])


def test_a_list_in_a_partial_given_as_an_argument() -> None:
    k = [2.0]
    function = functools.partial(lambda factors, h: h * factors[0], k)
    check(Model(lambda m, h: h), lambda: k.__setitem__(0, 3.0), function)


def test_a_list_in_a_partial_in_an_attribute() -> None:
    k = {"k": [2.0]}
    body = functools.partial(lambda m, h, factors: h * factors["k"][0], factors=k)
    check(Model(body), lambda: k["k"].__setitem__(0, 3.0))


def test_the_object_of_a_bound_method() -> None:
    scaler = Scaler()
    model = Model(lambda m, h: h)
    check(model, lambda: scaler.factors.__setitem__(0, 3.0), scaler.scaled)
    scaler.factors[0] = 1.0
    model.body = lambda m, h: m.method(h)
    model.method = scaler.scaled  # type: ignore[assignment]
    check(model, lambda: scaler.factors.__setitem__(0, 3.0))


def test_defaults_of_a_function() -> None:
    def body(m: Any, h: Tensor, factors: Any = [1.0], *, shift: Any = {"a": 0.0}) -> Tensor:  # noqa: B006
        return h * factors[0] + shift["a"]

    defaults: Any = body.__defaults__
    assert defaults
    keywords: Any = body.__kwdefaults__
    assert keywords
    check(Model(body), lambda: operator.setitem(defaults[0], 0, 2.0))
    check(Model(body), lambda: keywords["shift"].update(a=2.0))

    def replace() -> None:
        body.__defaults__ = ([7.0],)

    check(Model(body), replace)


@pytest.mark.parametrize("nested", [False, True])
def test_a_number_in_the_globals(monkeypatch: pytest.MonkeyPatch, nested: bool) -> None:
    body = (lambda m, h: h * scaled_by(1.0)) if nested else (lambda m, h: h * SCALE)
    check(Model(body), lambda: monkeypatch.setitem(globals(), "SCALE", 2.0))


def test_a_list_in_a_dict_in_the_globals() -> None:
    try:
        check(Model(lambda m, h: h * OPTIONS["scale"][0]), lambda: OPTIONS["scale"].__setitem__(0, 2.0))
    finally:
        OPTIONS["scale"][0] = 1.0


def test_an_attribute_of_a_class_and_of_an_object_in_the_globals(monkeypatch: pytest.MonkeyPatch) -> None:
    check(Model(lambda m, h: h * Config.scale), lambda: monkeypatch.setattr(Config, "scale", 2.0))
    monkeypatch.undo()
    body = lambda m, h: h * SETTINGS.inner.scale  # noqa: E731
    check(Model(body), lambda: monkeypatch.setattr(SETTINGS.inner, "scale", 2.0, raising=False))


def test_a_function_that_was_replaced_in_another_module(monkeypatch: pytest.MonkeyPatch) -> None:
    def gelu(h: Tensor) -> Tensor:
        return h + 1

    check(Model(lambda m, h: nn.functional.gelu(h)), lambda: monkeypatch.setattr(nn.functional, "gelu", gelu))


@pytest.mark.parametrize("where", ["attribute", "globals", "closure"])
def test_an_element_of_an_array(where: str) -> None:
    held = np.ones(6, dtype=np.float32)
    bodies: dict[str, Any] = {
        "attribute": lambda m, h: h * torch.from_numpy(m.array.copy()),
        "globals": lambda m, h: h * float(TABLE[2]),
        "closure": lambda m, h: h * float(held[2]),
    }
    model = Model(bodies[where])
    array = {"attribute": model.array, "globals": TABLE, "closure": held}[where]
    try:
        check(model, lambda: array.__setitem__(2, 2.0))
    finally:
        TABLE[:] = 1


def test_a_tensor_in_the_globals_that_is_written_to_or_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        check(Model(lambda m, h: h + SHIFT), lambda: SHIFT.fill_(1.0))  # type: ignore[arg-type]
    finally:
        SHIFT.zero_()
    check(Model(lambda m, h: h + SHIFT), lambda: monkeypatch.setitem(globals(), "SHIFT", torch.ones(6)))


def test_a_tensor_of_an_object_deep_in_an_attribute_that_is_replaced() -> None:
    model = Model(lambda m, h: h + m.a[0]["b"].c["d"].shift)
    model.a = [{"b": SimpleNamespace(c={"d": SimpleNamespace(shift=torch.zeros(6))})}]  # type: ignore[assignment]
    check(model, lambda: setattr(model.a[0]["b"].c["d"], "shift", torch.ones(6)))  # type: ignore[index]
