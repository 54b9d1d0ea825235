"""What a model does to its arguments is done to the caller's own, once per call; who is who stays so."""

from __future__ import annotations

import copy
import uuid
import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpass
from fxpass.capture import Call, CaptureError, capture, unsplit
from fxpass.capture.evaluate import evaluate
from fxpass.runtime.calls.module import ParallelModule
from tests.capture.test_soundness import Layer, Memory, assert_alike

Body = Callable[[Tensor, Any], Any]


class Model(nn.Module):
    """A function of what a linear layer makes of the first argument, and of the others as they are."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.body = body

    def forward(self, x: Tensor, *others: Any) -> Any:
        return self.body(self.linear(x), *others)


def sample() -> Tensor:
    return torch.randn(1, 6, 6)


def parallel(body: Callable[..., Any], ranks: int = 2) -> tuple[Model, ParallelModule]:
    model = Model(body).eval()
    return model, fxpass.parallelize(model, ranks, executor="lockstep")  # type: ignore[return-value]


def alike(model: nn.Module, module: nn.Module, x: Tensor, *others: Any) -> Any:
    """One call of both: outputs and arguments are alike afterwards."""
    own = copy.deepcopy((x, *others))
    with torch.no_grad():
        expected, found = model(*own), module(x, *others)
    for one, other in ((found, expected), ((x, *others), own)):
        assert_alike(one, other, exact=False)
    return found


def stored(x: Tensor, cache: Any) -> Tensor:
    cache.layers[0].keys = x * 2
    return x


def filled(x: Tensor, cache: Any) -> Tensor:
    cache.layers[0].keys[:, 1:].copy_(x[:, 1:])
    cache.layers[0].keys[:, 0] += 1
    return x + cache.layers[0].keys.sum()


def through_data(x: Tensor, cache: Any) -> Tensor:
    cache.layers[0].keys.data.mul_(2)
    return x + cache.layers[0].keys


def appended(x: Tensor, cache: Any) -> Tensor:
    cache.layers.append(Layer(x * 2))
    return x


def emptied(x: Tensor, cache: Any) -> Tensor:
    return x + cache.layers.pop(0).keys


def renamed(x: Tensor, cache: Any) -> Tensor:
    cache.values = cache.layers[0].keys
    cache.layers[0].keys = None
    del cache.length
    return x


def noted(x: Tensor, cache: Any) -> Tensor:
    cache.mode, cache.seen, cache.shape = "full", True, (x.shape[1], [x * 3])
    return x


def old_and_new(x: Tensor, cache: Any) -> tuple[Tensor, ...]:
    keys = cache.layers[0].keys
    old = keys.clone()
    keys.add_(x)
    return old, keys[:, 1:], keys.view(-1), keys


@pytest.mark.parametrize(
    "body", [stored, filled, through_data, appended, emptied, renamed, noted, old_and_new], ids=lambda b: b.__name__
)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_writes_to_a_cache_reach_the_callers_cache(body: Body, ranks: int) -> None:
    model, module = parallel(body, ranks)
    for _ in range(2):
        alike(model, module, sample(), Memory(sample(), sample()))
    assert len(module._engine.programs) == 1


def test_a_cache_without_tensors_is_filled() -> None:
    model, module = parallel(stored)
    for _ in range(3):
        alike(model, module, sample(), Memory(None))
    assert len(module._engine.programs) == 1
    alike(model, module, sample(), Memory(sample()))
    assert len(module._engine.programs) == 2


@pytest.mark.parametrize("kind", [dict, OrderedDict, list, SimpleNamespace])
def test_a_cache_of_any_kind_that_grows_from_call_to_call(kind: type) -> None:
    def body(x: Tensor, cache: Any) -> Tensor:
        table = vars(cache) if kind is SimpleNamespace else cache
        old = list(table) if kind is list else list(table.values())
        for each in old:
            x = x + each.mean()
        table.append(x) if kind is list else table.update({f"step {len(old)}": x})
        return x

    (model, module), cache = parallel(body), kind()
    if kind is SimpleNamespace:
        cache.first = sample()
    for _ in range(3):
        alike(model, module, sample(), cache)


def test_a_cache_that_a_program_has_filled_serves_the_next() -> None:
    """Also if all that was put there is a constant."""

    def body(x: Tensor, cache: dict[str, Tensor]) -> Tensor:
        if "sum" not in cache:
            cache["sum"] = torch.zeros(6)
        cache["sum"].add_(x.sum((0, 1)))
        cache["ones"] = torch.ones(6)
        return x + cache["sum"]

    model, module = parallel(body)
    for _ in range(2):
        cache: dict[str, Tensor] = {}
        for _ in range(3):
            alike(model, module, sample(), cache)
            cache["ones"].mul_(7)


def test_a_number_that_counts_up_asks_for_a_program_each_time() -> None:
    def body(x: Tensor, cache: Any) -> Tensor:
        cache.length += 1
        return x * cache.length

    (model, module), cache = parallel(body), Memory(sample())
    for _ in range(3):
        alike(model, module, sample(), cache)
    assert type(cache.length) is int


def test_capture_writes_nothing() -> None:
    def body(x: Tensor, y: Tensor, cache: Any) -> Tensor:
        y.mul_(2)
        if y.sum() > 0:  # a guard on what was written
            stored(y, cache)
        return filled(x + y, cache)

    model, (y, cache) = Model(body).eval(), (torch.ones(1, 6, 6), Memory(sample()))
    before = copy.deepcopy((y, cache))
    program = capture(model, sample(), y, cache)
    assert_alike((y, cache), before)
    assert [guard.path for guard in program.guards] == ["others.0"]
    unsplit(model, Call.of(model, (sample(), y, cache), {}))
    assert_alike((y, cache), before)
    module = fxpass.parallelize(model, 2, executor="lockstep")
    for sign in (1, -1, 1):
        alike(model, module, sample(), sign * torch.ones(1, 6, 6), Memory(sample()))


def test_tensors_that_change_places() -> None:
    def body(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        old = y.clone()
        y.copy_(z)
        z.copy_(old)
        return x

    alike(*parallel(body), sample(), sample(), sample())


def test_an_argument_that_is_returned_is_the_callers_own_object() -> None:
    def body(x: Tensor, y: Tensor, cache: Any) -> Any:
        y.add_(1)
        cache["y"] = y
        return x, y, cache, {"layers": cache["layers"]}

    model, module = parallel(body)
    y, cache = sample(), {"layers": [sample()]}
    found = alike(model, module, sample(), y, cache)
    assert found[1] is y
    assert found[2] is cache
    assert cache["y"] is y
    assert found[3]["layers"] is cache["layers"]


def test_a_model_may_ask_whether_two_arguments_are_one_tensor() -> None:
    model, module = parallel(lambda x, y, z: x * 2 if y is z else x + z)
    y = sample()
    for z in (y, sample(), y):
        alike(model, module, sample(), y, z)


def test_a_write_to_a_tensor_that_is_given_twice_is_seen_in_both_places() -> None:
    model, module = parallel(lambda x, y, z: x + y.mul_(2) + z)
    y = sample()
    alike(model, module, sample(), y, y)
    alike(model, module, sample(), y, sample())


def test_parts_of_one_tensor_may_be_written_to() -> None:
    model, module = parallel(lambda x, y, z: x + y.mul_(2) + z)
    y, z = torch.randn(2, 1, 6, 6)
    alike(model, module, sample(), y, z)


def test_a_write_to_memory_that_something_else_sees_is_refused() -> None:
    model, module = parallel(lambda x, y, *z: x + y.mul_(2).sum() + sum(each.sum() for each in z))
    y = sample()
    alike(model, module, sample(), y, y.clone())
    for other in (y.view(6, 6)[None], y[:, 1:]):
        with pytest.raises(CaptureError, match=r"writes to others\.0, which shares memory with others\.1"):
            module(sample(), y, other)
    with pytest.raises(CaptureError, match=r"shares memory with linear\.weight"):
        module(sample(), model.linear.weight.detach()[None])


def test_a_container_that_is_given_twice_and_written_to_is_refused() -> None:
    def body(x: Tensor, one: dict[str, Tensor], other: dict[str, Tensor]) -> Tensor:
        one["x"] = x
        return x + other.get("x", 0)

    model, module = parallel(body)
    one: dict[str, Tensor] = {}
    alike(model, module, sample(), {}, {})
    with pytest.raises(CaptureError, match=r"writes to others\.0, which was given to it twice"):
        module(sample(), one, one)


class Marked:
    """An object that nobody can see into."""

    __slots__ = ("count",)


def test_a_write_to_what_cannot_be_written_to_again_is_refused() -> None:
    def count(x: Tensor, marked: Any) -> Tensor:
        marked.count = getattr(marked, "count", 0) + 1
        return x

    def add(x: Tensor, marked: Any) -> Tensor:
        marked.add(len(marked))
        return x

    for write, argument in ((count, Marked()), (add, {"a", "b"})):
        with pytest.raises(CaptureError, match=r"the model writes to its arguments: others\.0 is new .* write to a"):
            capture(Model(write), sample(), argument)


class Patch:
    """As node-based user interfaces hand them to models."""

    def __init__(self, weight: Tensor, *others: Any) -> None:
        self.weight, self.others = weight, others

    def __call__(self, x: Tensor) -> Tensor:
        x = x * self.weight
        for other in self.others:
            x = x * other if isinstance(other, float) else other(x)
        return x

    def shift(self, x: Tensor) -> Tensor:
        return x + self.weight


def scaled(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x * weight + (0 if bias is None else bias)


def closing_over(weight: Tensor) -> Callable[[Tensor], Tensor]:
    def inner(x: Tensor, scale: float = 0.5) -> Tensor:
        return x * weight * scale

    return inner


class Patched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, options: dict[str, Any]) -> Tensor:
        x = self.linear(x)
        for patch in options["patches"]:
            x = patch(x)
        return x


PATCHES: dict[str, Callable[[Tensor], Any]] = {
    "object": Patch,
    "nested": lambda w: Patch(Patch(w).weight * 2, 0.5).__call__,
    "object in an object": lambda w: Patch(w, 2.0, Patch(w)),
    "method": lambda w: Patch(w).shift,
    "partial": lambda w: partial(scaled, weight=w, bias=w * 2),
    "partial of a method": lambda w: partial(partial(Patch.shift, Patch(w))),
    "closure": closing_over,
    "closure over a function": lambda w: closing_over(closing_over(w)(w)),
    "defaults": lambda w: lambda x, w=w: x + w,
    "list in a closure": lambda w: (lambda kept: lambda x: x - kept[0])([w]),
}


@pytest.mark.parametrize("kind", PATCHES)
def test_tensors_in_callable_arguments_are_inputs(kind: str) -> None:
    """New values are seen in each call, without a new capture, in whatever object they are."""
    model = Patched().eval().requires_grad_(False)
    module: Any = fxpass.parallelize(model, 2, executor="lockstep")
    plan = None
    for _ in range(3):
        x, weight = torch.randn(1, 6, 4), torch.randn(4)
        options = {"patches": [PATCHES[kind](weight)]}
        torch.testing.assert_close(module(x, options), model(x, options))
        weight.add_(1)  # the same objects, changed in place
        torch.testing.assert_close(module(x, options), model(x, options))
        assert plan is None or module.plan is plan
        plan = module.plan


def test_a_value_that_a_function_among_the_arguments_closes_over_is_watched() -> None:
    model = Patched().eval().requires_grad_(False)
    module: Any = fxpass.parallelize(model, 2, executor="lockstep")
    scale, x = [2.0], torch.randn(1, 6, 4)
    options = {"patches": [lambda h: h * scale[0]]}
    torch.testing.assert_close(module(x, options), model(x, options))
    scale[0] = 3.0
    torch.testing.assert_close(module(x, options), model(x, options))


@pytest.mark.parametrize("held", [lambda m: m, lambda m: Patch(torch.ones(4), m), lambda m: lambda x: m(x) + 1])
def test_weights_of_a_module_among_the_arguments_are_refused_by_name(held: Any) -> None:
    other = nn.Linear(4, 4)
    with pytest.raises(CaptureError, match=r"options\.patches\.0.*weight, a tensor of a module in its arguments: add"):
        capture(Patched(), torch.randn(1, 6, 4), {"patches": [held(other)]})


def test_a_module_of_the_model_may_be_an_argument() -> None:
    model = Patched().eval().requires_grad_(False)
    x, options = torch.randn(1, 6, 4), {"patches": [model.linear]}
    program = capture(model, x, options)
    torch.testing.assert_close(evaluate(program, model, Call.of(model, (x, options), {})), model(x, options))


def test_an_object_with_tensors_that_refers_to_itself_is_refused() -> None:
    patch = Patch(torch.ones(4))
    patch.itself = patch
    with pytest.raises(
        CaptureError, match=r"'options\.patches\.0\.itself' is a Patch that holds tensors and refers to"
    ):
        capture(Patched(), torch.randn(1, 6, 4), {"patches": [patch]})


def test_a_tuple_that_is_the_last_argument_passed_by_position_stays_one_argument() -> None:
    class Shifted(nn.Module):
        def forward(self, x: Tensor, pair: tuple[Tensor, Tensor]) -> Tensor:
            return x * pair[0] + pair[1]

    model = Shifted().eval()
    module = fxpass.parallelize(model, 2, executor="lockstep")
    alike(model, module, sample(), (torch.randn(1), torch.randn(1)))


def test_an_error_of_the_model_notes_which_inputs_are_on_another_device() -> None:
    with pytest.raises(RuntimeError) as raised:
        capture(nn.Linear(4, 4), torch.randn(2, 4, device="meta"))
    assert "input input is on meta, the model on cpu" in raised.value.__notes__


def test_an_object_to_which_weak_references_are_made_meanwhile_is_the_same_argument() -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor, names: list[uuid.UUID]) -> Tensor:
            return x * 2

    module: Any = fxpass.parallelize(Named().eval(), 2, executor="lockstep")
    names = [uuid.uuid4()]
    for _ in range(3):
        module(sample(), names)
        weak = weakref.ref(names[0])
        assert weak() is names[0]
    assert len(module._engine.programs) == 1
