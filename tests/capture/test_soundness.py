"""Small modules that do what real ones do, and what must be refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from fxpass.capture import Call, broken_guard, capture, outdated
from fxpass.capture.evaluate import evaluate
from fxpass.capture.objects import flatten
from fxpass.ir.program import Program, calls
from tests.capture.unchanged import refused


class Block(nn.Module):
    """A linear layer around a function of (module, input)."""

    def __init__(self, body: Callable[[Block, Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.body = body
        self.register_buffer("count", torch.zeros(6))
        self.register_buffer("table", torch.arange(6.0), persistent=False)
        self.register_buffer("scale", torch.tensor(2.0))
        self.plain = torch.linspace(0, 1, 6)
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Any:
        return self.body(self, self.linear(x))


def same(model: nn.Module, program: Program, *args: Any, **kwargs: Any) -> Any:
    call = Call.of(model, args, kwargs)
    assert broken_guard(program, model, call.tensors) is None
    own = call.rebuild(call.with_numbers([tensor.clone() for tensor in call.tensors]))
    with torch.no_grad():
        expected, found = call.run(model, own), evaluate(program, model, call)
    assert_alike(call.arguments, own)
    assert_alike(found, expected)
    return found


def assert_alike(found: Any, expected: Any, exact: bool = True) -> None:
    """Equal structure and values; tensors to rounding where not `exact`."""
    (leaves, form), (wanted, wanted_form) = flatten(found), flatten(expected)
    assert form == wanted_form
    for leaf, other in zip(leaves, wanted, strict=True):
        assert type(leaf) is type(other)
        if isinstance(leaf, Tensor):
            assert leaf.shape == other.shape
            assert torch.equal(leaf, other) if exact else torch.allclose(leaf, other, rtol=1e-5, atol=1e-6)
        else:
            assert leaf == other or (hasattr(leaf, "__dict__") and vars(leaf) == vars(other))


def captured(body: Callable[[Block, Tensor], Any]) -> Program:
    """Capture on one input, compare on another; the program is pure, the model unchanged."""
    model = Block(body).eval()
    state = copy.deepcopy(model.state_dict())
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    program = capture(model, torch.randn(4, 6))
    same(model, program, torch.randn(4, 6))
    for node in calls(program.graph):
        assert not getattr(getattr(node.target, "_schema", None), "is_mutable", False)
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == attributes
    assert all(parameter.requires_grad for parameter in model.parameters())
    return program


def filled(m: Block, x: Tensor) -> Tensor:
    out = torch.zeros(4, 12)
    out[:, :6] = x
    out[:, 6:].copy_(x * 2)
    out[0] += 1
    out.view(2, 2, 12)[1].mul_(0.5)
    out.t()[3] = 7
    return out


def parts(m: Block, x: Tensor) -> Tensor:
    y = x * 1
    a, b, c = y.chunk(3, dim=1)
    a.add_(1)
    b.zero_()
    c[0] = a[1]
    y.unbind(0)[2].fill_(3.0)
    y.unsqueeze(0).permute(0, 2, 1)[:, 1].sub_(2)
    return y + a.sum()


def data(m: Block, x: Tensor) -> Tensor:
    y = x * 1
    y.data.mul_(3)
    y.data[0] = 5
    return y


def masked(m: Block, x: Tensor) -> Tensor:
    y = x * 1
    y[y > 0] = -1.0
    y.masked_fill_(y < -0.5, 4)
    torch.add(y, 1, out=y)
    y.clamp_(max=3).pow_(2)
    return F.silu(y, inplace=True)


def narrow_types(m: Block, x: Tensor) -> Tensor:
    y = x.to(torch.bfloat16)
    y.add_(x)
    y[:2] = torch.arange(6)
    return y


def diagonals(m: Block, x: Tensor) -> Tensor:
    mask = torch.zeros(8, 8)
    mask[:6, :6] = -torch.inf
    mask[:6, :6].fill_diagonal_(0)
    square, tall, deep = (x.T @ x).clone(), x.T[:, :3].clone(), x[:3, :3].expand(3, 3, 3).clone()
    square.fill_diagonal_(2.0)
    tall.fill_diagonal_(-1)
    deep[:, :, :3].fill_diagonal_(5)
    return mask.exp()[:6, :6] @ square + tall.sum() + (deep * deep.cumsum(0)).sum()


@pytest.mark.parametrize("body", [filled, parts, data, masked, narrow_types, diagonals], ids=lambda body: body.__name__)
def test_in_place_operators_are_made_functional(body: Any) -> None:
    captured(body)


@dataclass
class Output:
    sample: Tensor
    extra: tuple[Any, ...] | None = None


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: Output(x, (x + 1, None, "text", 3)),
        lambda m, x: {"a": x, "b": [x * 2, (x,)]},
        lambda m, x: (x, x, x[0], None),
        lambda m, x: [m.linear.weight, m.plain, m.table],
        lambda m, x: x.sum(),
    ],
    ids=["dataclass", "dict", "aliases", "weights", "scalar"],
)
def test_outputs_keep_their_form(body: Any) -> None:
    captured(body)


def test_an_input_returned_as_it_is_stays_that_tensor() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return x, x + y

    model, x = Model(), torch.randn(3)
    assert same(model, capture(model, torch.randn(3), torch.randn(3)), x, torch.randn(3))[0] is x


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: x * m.plain + m.table * m.scale + m.count,
        lambda m, x: x * torch.tensor([1.0, 2, 3, 4, 5, 6]) + torch.tensor(3.0) + torch.from_numpy(np.arange(6.0)),
        lambda m, x: F.linear(x, m.linear.weight.data * 2, m.linear.bias.detach()),
        lambda m, x: x + (1 if m.scale.item() > 1 else 0) * m.scale.tolist(),
        lambda m, x: torch.einsum("ab,cb->ac", x, x) @ x,
        lambda m, x: torch.utils.checkpoint.checkpoint(m.linear, x, use_reentrant=False),
    ],
    ids=["buffers", "literals", "weight data", "buffer value", "products", "checkpoint"],
)
def test_constants_and_weights_are_seen(body: Any) -> None:
    captured(body)


def test_tied_weights_are_one_and_changes_in_place_are_seen() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    model = Tied()
    program = capture(model, torch.randn(2, 5))
    assert sorted(program.weights.values()) == ["a.bias", "a.weight", "b.bias"]
    with torch.no_grad():
        model.a.weight.mul_(2)
    same(model, program, torch.randn(2, 5))


def test_a_plain_attribute_that_was_assigned_anew_or_changed_outdates_the_program() -> None:
    model = Block(lambda m, x: x * m.plain)
    program = capture(model, torch.randn(4, 6))
    assert list(program.attributes.values()) == ["plain"]
    assert not outdated(program, model)
    model.plain.add_(1)
    assert outdated(program, model)
    program = capture(model, torch.randn(4, 6))
    assert not outdated(program, model)
    model.plain = torch.ones(6)
    assert outdated(program, model)


def test_tables_built_at_the_first_call_become_constants() -> None:
    class Lazy(nn.Module):
        table: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.table is None:
                self.table = torch.arange(x.shape[-1]) * 1.0
            return x + self.table

    model = Lazy()
    program = capture(model, torch.randn(2, 5))
    assert [c.tolist() for c in program.constants.values()] == [[0, 1, 2, 3, 4]]
    same(model, program, torch.randn(2, 5))
    assert type(model.table) is Tensor


@pytest.mark.parametrize("inside", [False, True])
def test_autocast_is_part_of_the_program_and_of_the_key(inside: bool) -> None:
    def body(m: Block, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16 if inside else None, enabled=inside):
            y = m.linear(x.float())
        return torch.einsum("ab,cb->ac", m.linear(y.float()), x.float())

    model, x = Block(body).eval(), torch.randn(4, 6)
    key = Call.of(model, (x,), {}).key
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=not inside):  # nested dtypes share the cache
        assert Call.of(model, (x,), {}).key != key
        program = capture(model, x)
        assert same(model, program, torch.randn(4, 6)).dtype == torch.bfloat16
        model(x).sum().backward()  # nothing fake stayed in autocast's cache
    assert same(model, capture(model, x), x).dtype == torch.float32


def test_inference_tensors_hooks_and_replaced_forwards_are_captured() -> None:
    with torch.inference_mode():
        model: Any = Block(lambda m, x: m.get_submodule("compiled")(m.linear(x)))
        x = torch.randn(4, 6)
    model.linear.register_forward_hook(lambda module, args, output: output * 2)
    plain = model.linear.forward
    model.compiled = torch.compile(nn.Linear(6, 6))
    model.linear.forward = lambda x: plain(x) + 1
    hooks = dict(model.linear._forward_hooks)
    with torch.inference_mode():
        program = capture(model, x)
        with torch.compiler.set_stance("force_eager"):
            same(model, program, x + 1)
    assert dict(model.linear._forward_hooks) == hooks


class Cache(nn.Module):
    """Keeps what it saw in `holder`, of which `get` and `put` know the place."""

    def __init__(self, holder: Any, get: Any, put: Any, reset: bool) -> None:
        super().__init__()
        self._holder, self.get, self.put, self.reset = holder, get, put, reset
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        if self.reset:
            self.put(self._holder, None)
        y = self.linear(x)
        for part in x.split(1):  # as videos are encoded, frame by frame
            kept = self.get(self._holder)
            y = y + part if kept is None else y + part * kept
            self.put(self._holder, part * 2)
        return y


def holders() -> dict[str, tuple[Any, Any, Any]]:
    return {
        "list": ([None], lambda h: h[0], lambda h, v: h.__setitem__(0, v)),
        "nested": ({"a": [{"b": None}]}, lambda h: h["a"][0]["b"], lambda h, v: h["a"][0].update(b=v)),
        "object": (SimpleNamespace(kept=None), lambda h: h.kept, lambda h, v: setattr(h, "kept", v)),
        "tuple": ([(None,)], lambda h: h[0][0], lambda h, v: h.__setitem__(0, (v,))),
    }


@pytest.mark.parametrize("kind", holders())
def test_state_carried_between_calls_is_refused_wherever_it_is_kept(kind: str) -> None:
    model = Cache(*holders()[kind], reset=False).eval()
    assert "read, then replaced" in refused(model, torch.randn(2, 6))
    assert model.get(model._holder) is None


@pytest.mark.parametrize("kind", holders())
def test_attributes_that_are_set_and_read_within_one_call_are_captured(kind: str) -> None:
    model = Cache(*holders()[kind], reset=True).eval()
    with torch.no_grad():
        program = capture(model, torch.randn(2, 6))
        assert type(model.get(model._holder)) is Tensor
        same(model, program, torch.randn(2, 6))


def test_a_table_that_is_moved_to_where_it_is_already_is_no_state() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.scheduler = torch.randn(6), SimpleNamespace(scales=torch.randn(6), tables=[torch.randn(6)])

        def forward(self, x: Tensor) -> Tensor:
            self.table = self.table.to(x.device)
            self.scheduler.scales = self.scheduler.scales.to(x.device)
            self.scheduler.tables = [table.to(x.device) for table in self.scheduler.tables]
            return x * self.table + self.scheduler.scales * self.scheduler.tables[0]

    model = Model()
    same(model, capture(model, torch.randn(2, 6)), torch.randn(2, 6))


def test_state_that_every_second_call_reads_is_refused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.state = SimpleNamespace(value=None)

        def forward(self, x: Tensor) -> Tensor:
            old, self.state.value = self.state.value, None
            if old is None:
                self.state.value = x * 2
                return x
            return x + old

    model = Model()
    assert "read, then replaced" in refused(model, torch.ones(3))  # its first run has left something behind
    model(torch.ones(3))
    assert "from call to call in state.value" in refused(model, torch.ones(3))


def test_a_tensor_subclass_as_an_input_is_refused() -> None:
    class Model(nn.Module):
        def forward(self, sample: Tensor) -> Tensor:
            return sample * 2

    class Named(Tensor):
        pass

    for given in (torch.ones(3).as_subclass(Named), TwoTensor(torch.ones(3), torch.zeros(3))):
        assert f"the input sample is a {type(given).__name__}" in refused(Model(), given)


def test_a_weight_made_of_two_tensors_is_captured_as_two() -> None:
    model = nn.Linear(6, 5).requires_grad_(False)
    model.weight = nn.Parameter(TwoTensor(torch.randn(5, 6), torch.randn(5, 6)), requires_grad=False)
    assert "a TwoTensor" in refused(model, torch.ones(2, 6))  # so is what the model returns
    program = capture(nn.Sequential(model, First()), torch.ones(2, 6))
    assert sorted(program.weights.values()) == ["0.bias", "0.weight.a"]
    same(nn.Sequential(model, First()), program, torch.randn(2, 6))


class First(nn.Module):
    """The first of the tensors that one is made of."""

    def forward(self, x: Any) -> Tensor:
        return x.a * 1


def test_weights_on_several_devices_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    assert "several devices" in refused(model, torch.ones(1, 2))


def test_a_layer_that_has_no_weights_yet_and_is_not_called_is_on_no_device() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.other = nn.Linear(2, 2), nn.LazyBatchNorm1d(device="meta")

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x)

    model = Unused().eval()
    same(model, capture(model, torch.ones(1, 2)), torch.randn(1, 2))


def test_layers_whose_first_call_makes_their_weights_are_captured() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)).eval()
    same(model, capture(model, torch.ones(1, 2)), torch.randn(1, 2))


class Options(SimpleNamespace):
    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]
    __eq__ = object.__eq__


@pytest.mark.parametrize("kind", [Options, SimpleNamespace])
def test_an_object_that_was_changed_is_another_call(kind: Any) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, options: Any) -> Tensor:
            return x * options.scale if "skip" not in options.flags else x

    options = kind(scale=2.0, flags={"fast"})
    keys = [Call.of(Model(), (torch.ones(2), options), {}).key]
    keys.append(Call.of(Model(), (torch.zeros(2), options), {}).key)
    assert keys[0] == keys[1]
    options.scale = 3.0
    keys.append(Call.of(Model(), (torch.ones(2), options), {}).key)
    options.flags.add("skip")
    keys.append(Call.of(Model(), (torch.ones(2), options), {}).key)
    assert len(set(keys)) == 3


def test_an_argument_of_which_nothing_can_be_seen_is_refused() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, data: bytearray) -> Tensor:
            return x * len(data)

    assert "'data' is a bytearray" in refused(Model(), torch.ones(2), bytearray(3))


class Layer:
    def __init__(self, keys: Any) -> None:
        self.keys = keys


class Memory:
    """As models with a memory have them: not a dataclass, nothing that torch knows."""

    def __init__(self, *keys: Tensor | None) -> None:
        self.layers = [Layer(each) for each in keys]
        self.length = len(keys)


class Reads(nn.Module):
    def forward(self, x: Tensor, cache: Memory) -> Any:
        return [x + layer.keys * cache.length for layer in cache.layers]


def test_tensors_in_objects_are_inputs() -> None:
    model = Reads()
    program = capture(model, torch.randn(3), Memory(torch.randn(3), torch.randn(3)))
    assert program.input_paths == ("x", "cache.layers.0.keys", "cache.layers.1.keys", "cache.length")
    same(model, program, torch.randn(3), Memory(torch.randn(3), torch.randn(3)))
    call = Call.of(model, (torch.randn(3), Memory(torch.randn(3))), {})
    assert call.key != Call.of(model, (torch.randn(3), Memory(torch.randn(3), torch.randn(3))), {}).key


def test_objects_with_tensors_are_given_back_as_such() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Memory:
            return Memory(x + 1, x * 2)

    model, x = Model(), torch.randn(3)
    program = capture(model, torch.randn(3))
    found = evaluate(program, model, Call.of(model, (x,), {}))
    assert isinstance(found, Memory)
    assert torch.equal(found.layers[1].keys, x * 2)


def test_objects_that_hide_tensors_are_refused() -> None:
    class Slots:
        __slots__ = ("keys",)

        def __init__(self) -> None:
            self.keys = torch.ones(2)

    class Table(dict[str, Tensor]):
        pass

    class Model(nn.Module):
        def forward(self, x: Tensor, cache: Any) -> Tensor:
            return x

    for hidden in (Slots(), Table(keys=torch.ones(2)), np.ones(3)):
        assert "cache" in refused(Model(), torch.ones(3), hidden)
