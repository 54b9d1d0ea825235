"""What calls of a repeated module leave in their arguments stays on the ranks as rows, and any other use gathers it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpass
from fxpass.runtime.calls.deferred import DeferredTensor
from fxpass.runtime.calls.kept import KeepingEngine
from tests.runtime.calls.test_loops import FRAMES, Step, Video, step_of
from tests.torchrun import torchrun


@pytest.fixture(autouse=True)
def few_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a loop over eight frames is long."""
    monkeypatch.setattr("fxpass.runtime.calls.module.OPERATORS", 60)


@pytest.fixture
def collector_off() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


LEFT: list[Any] = []  #: the cache after the last frame


class Cached(Video):
    """Decodes frame by frame, and puts the cache into `LEFT`.

    Args:
        between: what the loop does with the cache after each frame.
        step: the module that it repeats.
    """

    def __init__(self, between: Callable[[list[Any]], Any] = lambda cache: None, step: nn.Module | None = None) -> None:
        super().__init__()
        self.between, self.step = between, step or Step()

    def decode(self, z: Tensor) -> Tensor:
        frames, cache = [], [None]
        for frame in self.before(z).movedim(2, 0).contiguous():
            frames.append(self.step(frame, cache))
            self.between(cache)
        LEFT[:] = cache
        return torch.stack(frames, 2)


def cached(**named: Any) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    return Cached(**named).eval(), torch.randn(1, 4, FRAMES, 16, 8)


def engine_of(module: Any) -> KeepingEngine:
    engine = step_of(module)._engine
    assert isinstance(engine, KeepingEngine)
    return engine


def received(module: Any, z: Tensor) -> dict[str, int]:
    """Bytes that a rank receives in the steps of one decode."""
    before = dict(step_of(module).traffic)
    module.decode(z)
    return {role: size - before.get(role, 0) for role, size in step_of(module).traffic.items()}


@torch.no_grad()
@pytest.mark.parametrize("world", [2, 3])
def test_a_cache_that_only_the_repeated_module_uses_is_never_gathered(world: int) -> None:
    model, z = cached()
    expected = model.decode(z)
    with fxpass.parallelize(model, world, executor="lockstep") as module:
        for _ in range(2):
            torch.testing.assert_close(module.decode(z), expected)
        assert received(module, z)["output"] <= expected.nbytes * (1 - 5 / 16)  # the frames alone: 5 of 16 rows are own
        (cache,) = LEFT
        assert isinstance(cache, DeferredTensor)
        assert cache.value is None


class Returning(Step):
    """Returns a new cache."""

    def forward(self, frame: Tensor, cache: Any) -> Any:
        now = self.first(frame).relu().sin().cos().tanh().exp().sigmoid()
        return self.last(now if cache is None else now + cache["first"]["now"].sin()), {"first": {"now": now}}


class Handing(Video):
    """Hands what one call returns to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.step = Returning()

    def decode(self, z: Tensor) -> Tensor:
        frames, cache = [], None
        for frame in self.before(z).movedim(2, 0).contiguous():
            out, cache = self.step(frame, cache)
            frames.append(out)
        return torch.stack(frames, 2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_cache_that_each_call_returns_beside_its_result_is_never_gathered(mode: Any) -> None:
    torch.manual_seed(0)
    model: Any = Handing().eval()
    z = torch.randn(1, 4, FRAMES, 16, 8)
    with mode(), fxpass.parallelize(model, 2, executor="lockstep") as module:
        expected = model.decode(z)
        for _ in range(2):
            torch.testing.assert_close(module.decode(z), expected)
        assert received(module, z)["output"] == expected.nbytes // 2


USES: dict[str, Callable[[list[Any]], Any]] = {
    "computed with": lambda cache: cache.__setitem__(0, 2 * cache[0]),
    "written to": lambda cache: cache[0].mul_(2),
    "cut": lambda cache: cache.__setitem__(0, cache[0][:, :]),
    "printed": lambda cache: str(cache[0]),
    "copied to another list": lambda cache: cache.__setitem__(slice(None), list(cache)),
    "left out": lambda cache: cache.__setitem__(0, None),
}


@torch.no_grad()
@pytest.mark.parametrize("name", USES)
def test_any_other_use_of_a_cache_between_two_calls_is_right(name: str) -> None:
    model, z = cached(between=USES[name])
    expected = model.decode(z)
    with fxpass.parallelize(model, 2, executor="lockstep") as module:
        for _ in range(2):
            torch.testing.assert_close(module.decode(z), expected)


class Writing(Step):
    """Writes to the cache in place."""

    def forward(self, frame: Tensor, cache: list[Any]) -> Tensor:
        now = self.first(frame).relu().sin().cos().tanh().exp().sigmoid()
        if cache[0] is None:
            cache[0] = now.clone()
        else:
            now = now + cache[0].add_(now).sin()
        return self.last(now)


class Sharing(Step):
    """The cache is a part of what it returns."""

    def forward(self, frame: Tensor, cache: list[Any]) -> Tensor:
        now = self.last(self.first(frame).relu().sin().cos().tanh().exp().sigmoid())
        before, cache[0] = cache[0], now[:, :2]
        return now if before is None else now.add_(before.mean())


class Growing(Step):
    """The cache of every other frame has other rows and other ranks' parts of them."""

    def forward(self, frame: Tensor, cache: list[Any]) -> Tensor:
        now = self.first(frame).relu().sin().cos().tanh().exp().sigmoid()
        before = cache[0]
        cache[0] = now[:, :, 1::3] if before is None or before.shape[2] == 16 else now.flip(2)
        return self.last(now if before is None else now + nn.functional.interpolate(before, now.shape[2:]))


class Conjugating(Step):
    """The cache is a conjugate whose values are not those in its memory."""

    def forward(self, frame: Tensor, cache: list[Any]) -> Tensor:
        now = self.first(frame).relu().sin().cos().tanh().exp().sigmoid()
        before, cache[0] = cache[0], torch.complex(now, now.sin()).conj()
        return self.last(now if before is None else now + before.imag)


@torch.no_grad()
@pytest.mark.parametrize("kind", [Writing, Sharing, Growing, Conjugating])
def test_caches_that_are_written_to_or_shared_or_lie_in_memory_otherwise_are_right(kind: type[Step]) -> None:
    torch.manual_seed(1)
    model, z = cached(step=kind())
    expected = model.decode(z)
    with fxpass.parallelize(model, 3, executor="lockstep") as module:
        for _ in range(3):
            torch.testing.assert_close(module.decode(z), expected)


@torch.no_grad()
@pytest.mark.parametrize("executor", ["lockstep", "spawn"])
def test_a_cache_that_outlives_the_loop_has_its_value(executor: Any) -> None:
    model, z = cached()
    model.decode(z)
    (expected,) = LEFT
    with fxpass.parallelize(model, 2, executor=executor) as module:
        for _ in range(2):
            module.decode(z)
        (found,) = LEFT
        torch.testing.assert_close(found + 0, expected)
        module.decode(z)
        (late,) = LEFT
    with pytest.raises(RuntimeError, match=r"cannot be gathered any more .*use it before the module is closed"):
        _ = late + 0


@torch.no_grad()
def test_ranks_free_the_rows_that_nobody_refers_to_without_the_cyclic_collector(collector_off: None) -> None:
    model, z = cached()
    with fxpass.parallelize(model, 2, executor="lockstep") as module:
        for _ in range(2):
            module.decode(z)
        held: Any = engine_of(module).executor
        assert len(held.held) == 1
        LEFT.clear()
        module.decode(z)
        assert len(held.held) == 1
    assert len(held.held) == 0


@torch.no_grad()
def test_plans_that_gather_values_of_many_shapes_are_released(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxpass.runtime.calls.kept.SIGNATURES", 2)
    model, _ = cached()
    with fxpass.parallelize(model, 2, executor="lockstep") as module:
        for rows in (8, 10, 12, 14):
            z = torch.randn(1, 4, FRAMES, rows, 8)
            torch.testing.assert_close(module.decode(z), model.decode(z))
        assert len(engine_of(module)._gathering) == 2


@torch.no_grad()
def test_worker_processes_keep_their_rows() -> None:
    model, z = cached()
    expected = model.decode(z)
    with fxpass.parallelize(model, 2, executor="spawn", timeout=60) as module:
        for _ in range(2):
            torch.testing.assert_close(module.decode(z), expected)
        assert received(module, z)["output"] == expected.nbytes // 2


def test_ranks_of_torchrun_keep_their_rows_and_gather_them_together(tmp_path: Path) -> None:
    """Through shared memory and, without it, through gloo."""
    for both in torchrun("tests.runtime.calls.kept_ranks", folder=tmp_path):
        for rank in both:
            assert rank["close"] == [True] * 3
            assert rank["output"] == rank["frames"]
            assert rank["cache"]
            assert rank["refused"]
