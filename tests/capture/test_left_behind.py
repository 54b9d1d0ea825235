"""What a forward call leaves behind, each call of its program leaves behind too; what cannot be, is refused."""

from __future__ import annotations

import gc
from collections import OrderedDict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fxpass
from fxpass.capture import Call, CaptureError, capture, unsplit

LATEST: dict[str, Tensor] = {}
LAST: Tensor | None = None
GLOBAL_LIST: list[Tensor] = []


class Model(nn.Module):
    """Two blocks; what is done to the values between them is a function of (model, value)."""

    def __init__(self, keep: Callable[[Any, Tensor], Any] = lambda model, h: None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.keep = keep
        self.feat: Any = None
        self.store: dict[str, Any] = {}
        self.seen: list[Tensor] = []
        self.state = SimpleNamespace(kept=None, parts=[])

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        self.keep(self, h)
        return self.second(h.relu())


def parallel(model: Model, ranks: int = 2) -> Any:
    return fxpass.parallelize(model.eval(), ranks, executor="lockstep")


def sample() -> Tensor:
    return torch.randn(1, 8, 6)


def fakes() -> list[Any]:
    """All fake tensors, also those that nobody refers to."""
    return [each for each in gc.get_objects() if type(each) is FakeTensor]


def alive(*earlier: Any) -> list[Any]:
    """Fake tensors that live somewhere, but for `earlier` ones."""
    gc.collect()
    return [each for each in fakes() if not any(each is e for e in earlier)]


@pytest.fixture(autouse=True)
def _globals() -> Any:
    yield
    LATEST.clear()
    GLOBAL_LIST.clear()


def put_attribute(m: Model, h: Tensor) -> None:
    m.feat = h


def put_entry(m: Model, h: Tensor) -> None:
    m.store["mean"] = h.mean()


def put_object(m: Model, h: Tensor) -> None:
    m.state.kept = (h, {"sum": h.sum(-1)})


def put_new_list(m: Model, h: Tensor) -> None:
    m.seen = []
    for part in h.split(2, dim=-1):
        m.seen.append(part)


def put_cleared(m: Model, h: Tensor) -> None:
    m.state.parts.clear()
    m.state.parts += [h, h * 2]


def put_global(m: Model, h: Tensor) -> None:
    LATEST["h"] = h


def put_global_name(m: Model, h: Tensor) -> None:
    global LAST
    LAST = h * 2


READERS: dict[Callable[[Any, Tensor], None], Callable[[Model], Any]] = {
    put_attribute: lambda m: [m.feat],
    put_entry: lambda m: [m.store["mean"]],
    put_object: lambda m: [m.state.kept[0], m.state.kept[1]["sum"]],
    put_new_list: lambda m: list(m.seen),
    put_cleared: lambda m: list(m.state.parts),
    put_global: lambda m: [LATEST["h"]],
    put_global_name: lambda m: [LAST],
}


@pytest.mark.parametrize("keep", READERS, ids=lambda keep: keep.__name__)
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_value_that_the_forward_keeps_is_that_of_the_latest_call(keep: Any, ranks: int) -> None:
    model = Model(keep)
    module = parallel(model, ranks)
    for _ in range(3):
        x = sample()
        with torch.no_grad():
            model(x)
        expected = READERS[keep](model)
        module(x + 1)
        module(x)
        for found, value in zip(READERS[keep](model), expected, strict=True):
            torch.testing.assert_close(found, value)
    assert len(module._engine.programs) == 1
    assert module._engine.programs.in_a_row == 0  # nothing was captured again


def test_a_forward_hook_that_appends_fires_once_in_each_call() -> None:
    model = Model()
    seen: list[Any] = []
    model.first.register_forward_hook(lambda module, args, output: seen.append(output))
    model.second.register_forward_hook(lambda module, args, output: seen.append(output))
    module, plain = parallel(model), []
    for _ in range(3):
        x = sample()
        module(x)
        with torch.no_grad():
            h = model.first.forward(x)
            plain += [h, model.second.forward(h.relu())]
    assert len(seen) == 6
    for found, value in zip(seen, plain, strict=True):
        torch.testing.assert_close(found, value)
    seen.clear()
    module(sample())
    assert len(seen) == 2


def test_a_variable_of_a_closure_gets_the_value_of_each_call() -> None:
    latest = None

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal latest
        latest = output

    model = Model()
    model.first.register_forward_hook(hook)
    module = parallel(model)
    for _ in range(2):
        x = sample()
        module(x)
        with torch.no_grad():
            torch.testing.assert_close(latest, model.first.forward(x))


def test_a_container_that_the_caller_replaces_is_filled_in_its_place() -> None:
    model = Model(put_entry)
    module = parallel(model)
    for _ in range(3):
        model.store = {}
        x = sample()
        module(x)
        with torch.no_grad():
            torch.testing.assert_close(model.store["mean"], model.first(x).mean())
    assert module._engine.programs.in_a_row == 0


class Bank:
    """A reference-only attention processor: one call writes its input, the next reads it."""

    def __init__(self) -> None:
        self.kept: Tensor | None = None
        self.mode = "write"

    def __call__(self, model: Model, h: Tensor) -> None:
        if self.mode == "write":
            self.kept = h.clone()
        else:
            assert self.kept is not None
            h += self.kept


@pytest.mark.parametrize("first", ["write", "read"])
def test_what_an_earlier_call_left_behind_and_a_later_one_reads_is_refused(first: str) -> None:
    earlier = fakes()
    bank = Bank()
    model = Model(bank)
    module = parallel(model)
    if first == "read":
        bank.kept, bank.mode = torch.randn(1, 8, 6), "read"
        module(sample())
        bank.mode = "write"
    module(sample())
    bank.mode = "read"
    with pytest.raises(CaptureError, match="which an earlier call left behind"):
        module(sample())
    del module
    assert alive(*earlier) == []


class Helper:
    """Wraps blocks in closures that keep their outputs, as helpers that skip blocks do."""

    def __init__(self, model: Model) -> None:
        self.outputs: dict[str, Tensor] = {}
        self.skip = False
        for name in ("first", "second"):
            block = getattr(model, name)
            block.forward = self._wrapped(name, block.forward)

    def _wrapped(self, name: str, forward: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Tensor:
            if not self.skip:
                self.outputs[name] = forward(*args, **kwargs)
            return self.outputs[name]

        return wrapped


def test_closures_that_keep_outputs_of_blocks_are_filled_and_refused_where_they_are_read() -> None:
    earlier = fakes()
    model = Model()
    helper = Helper(model)
    module = parallel(model)
    x = sample()
    found = module(x)
    torch.testing.assert_close(helper.outputs["second"], found)
    helper.skip = True
    with pytest.raises(CaptureError, match="which an earlier call left behind"):
        module(sample())
    del module
    assert alive(*earlier) == []


def keep_in_deque(kept: Any) -> Callable[[Any, Tensor], None]:
    return lambda m, h: kept.append(h)


@pytest.mark.parametrize("kind", [deque, set])
def test_what_no_program_can_put_there_is_refused_by_holder_and_line(kind: Any) -> None:
    earlier = fakes()
    kept = kind()
    model = Model((lambda m, h: kept.add(h)) if kind is set else (lambda m, h: kept.append(h)))
    with pytest.raises(CaptureError, match=rf"outlives the call in .*{kind.__name__}") as caught:
        capture(model.eval(), sample())
    assert "test_left_behind.py:" in str(caught.value)
    del caught
    assert not any(isinstance(each, FakeTensor) for each in kept)
    assert alive(*earlier) == []


def test_a_failed_capture_leaves_no_fake_tensor_in_lists_of_others() -> None:
    earlier = fakes()

    def keep(m: Model, h: Tensor) -> None:
        GLOBAL_LIST.append(h)
        if torch.compiler.is_compiling():
            raise ValueError("no")

    with pytest.raises(CaptureError, match="ValueError"):
        capture(Model(keep).eval(), sample())
    assert not any(isinstance(each, FakeTensor) for each in GLOBAL_LIST)
    assert alive(*earlier) == []


def test_a_refusal_searches_the_objects_of_the_process_a_few_times_however_many_values_are_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A search takes a second in a large process."""
    searches: list[int] = []
    held: deque[Tensor] = deque()
    referrers = gc.get_referrers

    def search(*objects: Any) -> list[Any]:
        searches.append(len(objects))
        return referrers(*objects)

    def keep(m: Model, h: Tensor) -> None:
        held.extend(h * k for k in range(40))
        if torch.compiler.is_compiling():
            raise ValueError("no")

    monkeypatch.setattr(gc, "get_referrers", search)
    with pytest.raises(CaptureError, match="ValueError"):
        capture(Model(keep).eval(), sample())
    assert max(searches) >= 40
    assert len(searches) <= 8
    assert not any(isinstance(each, FakeTensor) for each in held)


def test_what_is_left_behind_in_some_calls_only_is_refused() -> None:
    def keep(m: Model, h: Tensor) -> None:
        m.feat = h if m.feat is None else None

    with pytest.raises(CaptureError, match="feat in some calls only"):
        capture(Model(keep).eval(), sample())


def test_what_is_left_behind_is_an_output_of_the_program() -> None:
    model, x = Model(put_object).eval(), sample()
    program = capture(model, sample())
    outputs = unsplit(model, Call.of(model, (x,), {}), program)
    results: Any = program.graph.output_node().args[0]
    assert len(outputs) == len(results) == 3
    torch.testing.assert_close(outputs[1], model.first(x))


def test_a_value_left_behind_that_differs_when_the_model_is_recorded_is_refused() -> None:
    def keep(m: Model, h: Tensor) -> None:
        m.feat = h * 2 if torch.compiler.is_compiling() else h

    with pytest.raises(CaptureError, match="returns something else than the model did"):
        capture(Model(keep).eval(), sample())


def test_a_dict_that_refuses_update_is_put_back_as_it_was() -> None:
    class Output(dict[str, Any]):
        def update(self, *args: Any, **kwargs: Any) -> None:
            raise TypeError("not on an output")

    model = Model(lambda model, h: model.store["output"].__setitem__("sample", h))
    model.store["output"] = Output(sample=None)
    capture(model.eval(), torch.randn(2, 6))
    assert not isinstance(model.store["output"]["sample"], FakeTensor)


def test_a_model_without_memory_may_make_an_object_that_closes_over_itself() -> None:
    class Output(OrderedDict[str, Any]):
        def __delitem__(self, *args: Any) -> None:
            raise TypeError("not on an output")

        def to_tuple(self) -> tuple[Any, ...]:
            return tuple(self[key] for key in self.keys())

    class Returns(Model):
        def forward(self, x: Tensor) -> Any:
            output = Output(sample=super().forward(x))
            assert len(output.to_tuple()) == 1
            return output["sample"]

    with FakeTensorMode():
        model = Returns().eval()
        program = capture(model, sample())
    assert len(program.weights) == 4
    assert all(isinstance(each, FakeTensor) for each in model.parameters()), "weights stay the model's"


def test_a_table_that_no_input_changes_is_no_output() -> None:
    base = torch.arange(6.0)

    def put_table(m: Model, h: Tensor) -> None:
        m.feat = base + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])

    program = capture(Model(put_table).eval(), sample())
    assert program.changes == ()
    assert len(capture(Model(put_attribute).eval(), sample()).changes) == 1
