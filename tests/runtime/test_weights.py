"""Weights that workers hold copies of: sent once, then what has changed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from fxpass.ir.code import Form
from fxpass.runtime import weights
from fxpass.runtime.agreement import checksum
from fxpass.runtime.calls.module import ParallelModule
from fxpass.runtime.errors import RankError
from fxpass.runtime.lockstep import LockstepExecutor
from fxpass.runtime.spawn import SpawnExecutor
from fxpass.runtime.weights import allocate, bytes_of, dense, digests_of, pieces, views
from tests.properties import given
from tests.runtime.plans import Block, block, inputs, parallel

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn]
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tensor(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    bits = torch.randint(0, 2, (*shape, dtype.itemsize), generator=torch.Generator().manual_seed(seed))
    return bits.to(torch.uint8).view(dtype)[..., 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (5, 7), (130, 1031)], ids=str)
def test_a_digest_changes_with_any_element_and_with_their_order(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = tensor(dtype, *shape).clone()
    before = digests_of([weight])
    assert digests_of([weight.clone()]) == before
    if not weight.numel():
        return
    places = {0, weight.numel() // 2, weight.numel() - 1}
    for place in places:
        data = bytes_of(weight)[place * dtype.itemsize :]
        data[:1] ^= 1
        assert digests_of([weight]) != before
        data[:1] ^= 1
    assert digests_of([weight]) == before
    if weight.ndim == 2:
        for dim in (0, 1):
            order = torch.arange(weight.shape[dim]).flip(0)
            assert digests_of([weight.view(_BITS[dtype.itemsize]).index_select(dim, order)]) != before


def swap_rows(weight: Tensor) -> None:
    weight[[0, 4093]] = weight[[4093, 0]]


@pytest.mark.parametrize(
    ("weight", "change"),
    [
        pytest.param(torch.zeros(64, 64, dtype=torch.float64), Tensor.neg_, id="all signs of float64"),
        pytest.param(torch.zeros(320, 320), lambda data: data[:, 1::2].neg_(), id="signs of every second column"),
        pytest.param(torch.zeros(320, 320).bfloat16(), lambda data: data[:, 3].neg_(), id="signs of a bfloat16 column"),
        pytest.param(torch.zeros(64, 64), lambda data: data[:, 1].neg_(), id="signs of one column"),
        pytest.param(torch.zeros(5000, 64), swap_rows, id="two rows far apart"),
    ],
)
@pytest.mark.parametrize("words", [1 << 21, 1000], ids=["one chunk", "several chunks"])
def test_a_digest_changes_with_an_even_number_of_signs_and_with_rows_far_apart(
    weight: Tensor, change: Callable[[Tensor], Any], words: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_WORDS", words)
    weight.normal_(generator=torch.Generator().manual_seed(0))
    before = digests_of([weight])
    change(weight.data)
    assert digests_of([weight]) != before


def test_a_digest_does_not_depend_on_how_many_words_are_mixed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    several = [tensor(torch.float32, *shape, seed=i) for i, shape in enumerate([(3,), (60, 70), (5,), (999,)])]
    before = digests_of(several)
    for words in (1, 7, 1000):
        monkeypatch.setattr(weights, "_WORDS", words)
        assert digests_of(several) == before


def test_the_digest_of_a_weight_does_not_depend_on_the_others() -> None:
    shapes = [(3,), (), (200, 300), (0,), (9, 9)]
    several = [tensor(torch.float32, *shape, seed=i) for i, shape in enumerate(shapes)]
    several.append(several[2][:, 1:])
    together = digests_of(several)
    assert together == [digests_of([each])[0] for each in several]
    assert len(set(together)) == len(together)


def test_views_with_gaps_and_negated_views_are_sent_as_dense_tensors() -> None:
    base = torch.randn(6, 8)
    for view in (base[:, ::2], base.t(), base[1:, :5].t(), base[0, 3], torch._neg_view(base)):
        found = dense(view)
        assert torch.equal(found, view)
        assert not found.is_neg()
        copy = torch.empty_strided(found.shape, found.stride(), dtype=found.dtype)
        bytes_of(copy).copy_(bytes_of(found))
        assert torch.equal(copy, view)


@given(st.lists(st.integers(0, 50), max_size=6), st.integers(1, 20))
def test_pieces_bring_every_byte_once_in_order(sizes: list[int], room: int) -> None:
    named = {str(i): size for i, size in enumerate(sizes)}
    found: dict[str, list[int]] = {name: [] for name in named}
    for piece in pieces(named, room):
        parts = views(torch.empty(room, dtype=torch.uint8), piece)
        assert [len(part) for part in parts] == [size for _, _, size in piece]
        assert 0 < sum(map(len, parts)) <= room
        for name, start, size in piece:
            found[name] += range(start, start + size)
    assert found == {name: list(range(size)) for name, size in named.items()}


def test_a_copy_stays_where_it_is_unless_its_form_changes() -> None:
    cpu, weight = torch.device("cpu"), torch.randn(3, 4)
    held: dict[str, Tensor] = {}
    allocate({"w": Form.of(weight)}, held, cpu)
    old = held["w"]
    allocate({"w": Form.of(weight), "v": Form.of(weight)}, held, cpu)
    assert held["w"] is old
    assert held["v"] is not old
    for other in (weight.t(), weight.double(), weight[:2]):
        held["w"] = old
        allocate({"w": Form.of(other)}, held, cpu)
        assert held["w"] is not old
        assert Form.of(held["w"]) == Form.of(other)


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Block, ParallelModule]]:
    """A model and itself on two processes, with copies of its weights."""
    model = block()
    with parallel(model, SpawnExecutor(2, timeout=60, copies=True)) as module:
        yield model, module


@pytest.fixture
def sent(pair: tuple[Block, ParallelModule], monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The weights that are sent from now on, by message."""
    return noted_copies(pair[1], monkeypatch)


def noted_copies(module: ParallelModule, monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The weights that are sent from now on, by message."""
    executor: Any = module._engine.executor
    workers = executor.workers
    found: list[set[str]] = []
    send_to = workers.send_to

    def noted(worker: int, message: Any) -> None:
        if message[0] == "copies":
            found.append({name.partition("/")[2] for name in message[1]})
        send_to(worker, message)

    monkeypatch.setattr(workers, "send_to", noted)
    return found


def is_exact(model: nn.Module, module: ParallelModule, seed: int = 0) -> bool:
    lockstep = parallel(model, LockstepExecutor(2))
    return torch.equal(module(*inputs(seed=seed))["sample"], lockstep(*inputs(seed=seed))["sample"])


def test_copies_are_sent_once_and_again_where_they_have_changed(
    pair: tuple[Block, ParallelModule], sent: list[set[str]]
) -> None:
    model, module = pair
    assert is_exact(model, module)
    assert sent == [] or sent == [{name for name, _ in model.named_parameters()}]  # another test may have come first
    sent.clear()
    assert is_exact(model, module, seed=1)
    assert sent == []
    assert not any(p.is_shared() for p in model.parameters())
    with torch.no_grad():
        model.key.weight.mul_(1.5)  # as an adapter does that is switched in place
    assert is_exact(model, module)
    assert sent == [{"key.weight"}]
    model.value.weight.data = torch.randn_like(model.value.weight)
    assert model.conv_in.bias is not None
    model.conv_in.bias = nn.Parameter(model.conv_in.bias + 1)
    assert is_exact(model, module)
    assert sent[1:] == [{"value.weight", "conv_in.bias"}]
    model.key.weight.data = model.key.weight.data.t()  # other strides: a new program may be captured, or not
    assert is_exact(model, module)
    assert sent[-1] == {"key.weight"}
    assert len(sent) == 3


def test_a_new_module_brings_its_weights_alone(sent: list[set[str]], pair: tuple[Block, ParallelModule]) -> None:
    model, module = pair
    assert is_exact(model, module)
    sent.clear()
    before = model.value
    model.value = nn.Sequential(before, nn.Linear(16, 16))
    assert is_exact(model, module)
    assert sent == [{"value.0.weight", "value.0.bias", "value.1.weight", "value.1.bias"}]
    assert "value.weight" not in module._engine.executor._weights.names()
    model.value = before
    assert is_exact(model, module)
    assert sent[1:] == [{"value.weight", "value.bias"}]


def test_writes_that_torch_does_not_count_are_seen_at_the_next_call_that_nobody_announced(
    pair: tuple[Block, ParallelModule], sent: list[set[str]]
) -> None:
    model, module = pair
    assert is_exact(model, module)
    sent.clear()
    version = model.conv_in.weight._version
    model.conv_in.weight.data.view(-1)[5] += 0.5
    assert model.conv_in.weight._version == version
    assert is_exact(model, module)
    assert sent == [{"conv_in.weight"}]


def test_writes_that_torch_does_not_count_are_seen_when_the_next_generation_begins(
    pair: tuple[Block, ParallelModule], sent: list[set[str]]
) -> None:
    model, module = pair
    with module.generation():
        assert is_exact(model, module)
        sent.clear()
        model.conv_in.weight.data.mul_(1.25)
        assert not is_exact(model, module)  # documented: the workers still have what this generation began with
        assert sent == []
        with torch.no_grad():
            model.value.weight.add_(0.1)  # counted: sent at once
        module(*inputs())
        assert sent == [{"value.weight"}]
    with module.generation():
        assert is_exact(model, module)
    assert sent == [{"value.weight"}, {"conv_in.weight"}]


def test_contents_are_compared_once_in_each_generation_also_where_two_take_turns(
    pair: tuple[Block, ParallelModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, module = pair
    module(*inputs())
    compared: list[int] = []

    def noted(given: list[Tensor]) -> list[int]:
        compared.append(len(given))
        return digests_of(given)

    monkeypatch.setattr(weights, "digests_of", noted)
    loops = [module.generation(), module.generation()]
    for _ in range(3):
        for loop in loops:
            with loop:
                module(*inputs())
    assert len(compared) == 2
    module(*inputs())
    assert len(compared) == 3  # nobody has announced this call


def test_weights_larger_than_a_piece_arrive_whole_also_in_inference_mode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weights, "PIECE", 101)  # no multiple of an element
    model = block()
    with parallel(model, SpawnExecutor(2, timeout=60, copies=True)) as module:
        with torch.inference_mode():
            assert is_exact(model, module)
        with torch.no_grad():  # the buffer can be written to, wherever the first call was made
            model.key.weight.mul_(1.5)
        assert is_exact(model, module)


class Tied(nn.Module):
    """One tensor under two names, as two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tie()

    def tie(self) -> None:
        self.last.weight = nn.Parameter(self.first.weight.data)

    def forward(self, sample: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        x = (self.conv(sample) + timestep.view(-1, 1, 1, 1)).permute(0, 2, 3, 1)
        return {"sample": self.last(self.first(x).relu())}


@torch.no_grad()
def near(model: nn.Module, module: ParallelModule) -> bool:
    return torch.allclose(module(*inputs())["sample"], model(*inputs())["sample"], atol=1e-6)


def test_tied_weights_are_sent_once_and_stay_tied_until_they_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Tied().eval()
    compared: list[int] = []

    def noted(given: list[Tensor]) -> list[int]:
        compared.append(len(given))
        return digests_of(given)

    monkeypatch.setattr(weights, "digests_of", noted)
    with parallel(model, SpawnExecutor(2, timeout=60, copies=True)) as module, module.generation():
        assert near(model, module)
        found = noted_copies(module, monkeypatch)
        assert set(compared) == {5}  # of six names
        for write in (
            lambda: model.first.weight.mul_(1.5),  # torch counts it under one name
            lambda: model.last.weight.add_(0.5),
        ):
            with torch.no_grad():
                write()
            assert near(model, module)
            assert found.pop() == {"first.weight"}
        model.last.weight = nn.Parameter(2 * model.first.weight)
        assert near(model, module)
        assert found.pop() == {"last.weight"}
        model.tie()
        assert near(model, module)
        assert found.pop() == {"first.weight"}
        model.first.weight = nn.Parameter(3 * model.last.weight)
        assert near(model, module)
        assert found.pop() == {"first.weight"}
        assert not found


def test_changed_weights_are_waited_for_as_long_as_the_user_allows() -> None:
    model = block()
    executor = SpawnExecutor(2, timeout=1.5, copies=True)
    with parallel(model, executor) as module:
        module(*inputs())
        (child,) = executor.processes
        with torch.no_grad():
            model.key.weight.mul_(1.5)
        os.kill(child.pid, signal.SIGSTOP)
        with pytest.raises(RankError, match=r"no answer within 1\.5 s"):
            module(*inputs())


def test_modules_on_the_same_workers_have_weights_of_their_own_also_from_two_threads() -> None:
    models = [block(seed) for seed in (0, 1)]
    first = SpawnExecutor(2, timeout=60, copies=True)
    modules = [parallel(model, executor) for model, executor in zip(models, (first, first.share()), strict=True)]
    turn = modules[0]._engine.turn
    modules[1]._engine.turn = turn  # as the parts of a pipeline have
    modules[0].warmup(*inputs())

    def run(i: int) -> list[bool]:
        found = []
        for k in range(3):
            with torch.no_grad():
                models[i].key.weight.mul_(1.1 + i)
            found.append(is_exact(models[i], modules[i], seed=k))
        return found

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, range(2))) == [[True] * 3] * 2
    modules[0].close()
    assert is_exact(models[1], modules[1])
    modules[1].close()
    assert all(process.poll() is not None for process in first.processes)


class Turned(nn.Module):
    """Reads buffers that torch conjugates or negates when they are read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        turn = torch.view_as_complex(torch.randn(16, 2)).conj()
        self.register_buffer("turn", turn)
        self.register_buffer("lift", turn.imag)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.turn, Tensor)
        assert isinstance(self.lift, Tensor)
        x = self.conv(x) * self.lift + self.lift.resolve_neg()
        return torch.view_as_real(x * self.turn * self.turn.resolve_conj()).sum(-1)


@pytest.mark.parametrize("copies", [False, True])
def test_weights_that_torch_conjugates_or_negates_lazily_arrive_with_their_values(copies: bool) -> None:
    model, x = Turned().eval(), torch.randn(1, 3, 16, 16)
    with parallel(model, SpawnExecutor(2, timeout=60, copies=copies)) as module:
        torch.testing.assert_close(module(x), model(x))
    for weight in (model.turn, model.lift):
        assert isinstance(weight, Tensor)
        assert weight.is_conj() or weight.is_neg()
        assert checksum(weight) == checksum(weight.resolve_conj().resolve_neg()) != checksum(2 * weight)
