"""Methods that run a module again and again: where the loop is too long to be unrolled, its calls run on all ranks."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpass
from fxpass.capture.runs import Runs
from fxpass.runtime.calls.attached import attach, detach
from fxpass.runtime.calls.module import ParallelModule

FRAMES = 8


class Step(nn.Module):
    """Decodes a frame, given what the frame before has left in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, frame: Tensor, cache: list[Any]) -> Tensor:
        now = self.first(frame).relu().sin().cos().tanh().exp().sigmoid()
        before, cache[0] = cache[0], now
        return self.last(now if before is None else now + before.sin())


class Video(nn.Module):
    """Decodes frame by frame."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.step = nn.Conv3d(4, 4, 1), Step()

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, z: Tensor) -> Tensor:
        frames, cache = self.before(z).movedim(2, 0).contiguous(), [None]
        return torch.stack([self.step(frame, cache) for frame in frames], 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


@pytest.fixture(autouse=True)
def few_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a loop over eight frames is long."""
    monkeypatch.setattr("fxpass.runtime.calls.module.OPERATORS", 60)


def video() -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    return Video().eval(), torch.randn(1, 4, FRAMES, 16, 8)


def step_of(module: ParallelModule) -> ParallelModule:
    """The parallel module that runs the steps of a loop."""
    loops = module._engine.loops
    assert loops is not None
    return loops._modules["step"]


def programs(module: ParallelModule) -> int:
    return len(list(module._engine.programs.all()))


@torch.no_grad()
def test_the_calls_of_a_long_loop_are_split_by_a_program_for_each_kind_of_call() -> None:
    model, z = video()
    expected = model.decode(z)
    with warnings.catch_warnings(), fxpass.parallelize(model, 2, executor="lockstep") as module:
        warnings.simplefilter("error")
        for _ in range(2):
            torch.testing.assert_close(module.decode(z), expected)
        assert programs(step_of(module)) == 2  # without and with a frame before
        assert step_of(module).traffic["halo"] > 0
        more = torch.cat([z, z], 2)
        torch.testing.assert_close(module.decode(more), model.decode(more))
        assert programs(step_of(module)) == 2


MEANWHILE: list[Callable[[], None]] = []  #: called after each frame


class Interrupted(Video):
    def decode(self, z: Tensor) -> Tensor:
        frames, cache = [], [None]
        for frame in self.before(z).movedim(2, 0).contiguous():
            frames.append(self.step(frame, cache))
            for each in MEANWHILE:
                each()
        return torch.stack(frames, 2)


@torch.no_grad()
def test_a_call_of_another_thread_waits_for_a_loop_and_finds_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = Interrupted().eval()
    z = torch.randn(1, 4, FRAMES, 16, 8)
    expected = model.decode(z)
    with fxpass.parallelize(model, 2, executor="lockstep") as module:
        for _ in range(2):
            module.decode(z)
        monkeypatch.setattr("fxpass.runtime.calls.programs.capture_call", None)  # nothing is captured again
        found: list[Tensor] = []
        thread = threading.Thread(target=lambda: found.append(decoded(module, z)))

        def start() -> None:
            if thread.ident is None:
                thread.start()
                thread.join(0.5)

        monkeypatch.setattr(sys.modules[__name__], "MEANWHILE", [start])
        found.append(module.decode(z))
        thread.join()
        for each in found:
            torch.testing.assert_close(each, expected)
        assert len(found) == 2
    assert "forward" not in vars(model.step)


@torch.no_grad()
def decoded(module: Any, z: Tensor) -> Tensor:
    return module.decode(z)


@torch.no_grad()
def test_a_short_loop_is_one_program() -> None:
    model, z = video()
    with fxpass.parallelize(model, 2, executor="lockstep") as module:
        torch.testing.assert_close(module.decode(z[:, :, :2]), model.decode(z[:, :, :2]))
        torch.testing.assert_close(module.decode(z), model.decode(z))
        assert programs(module) == 1
        torch.testing.assert_close(module.decode(z[:, :, :2]), model.decode(z[:, :, :2]))
        assert programs(module) == 1


@torch.no_grad()
def test_a_long_loop_is_recorded_once_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, z = video()
    with fxpass.parallelize(model, 2, executor="lockstep") as module:
        module.decode(z)
        monkeypatch.setattr("fxpass.runtime.calls.programs.capture_call", lambda *_: 1 / 0)
        torch.testing.assert_close(module.decode(z), model.decode(z))


@torch.no_grad()
def test_the_model_itself_stays_plain_between_the_calls() -> None:
    model, z = video()
    module = fxpass.parallelize(model, 2, executor="lockstep")
    module.decode(z)
    received = step_of(module).traffic
    model.decode(z)
    assert step_of(module).traffic == received
    assert "forward" not in vars(model.step)
    module.close()
    with pytest.raises(RuntimeError, match="was closed"):
        module.decode(z)


class Halves(Video):
    """Decodes the upper and the lower half by a call of `decode` each."""

    def decode(self, z: Tensor, whole: bool = True) -> Tensor:
        if not whole:
            return super().decode(z)
        return torch.cat([self.decode(half, False) for half in z.chunk(2, -2)], -2)


class Twice(Video):
    """Decodes by a call of `encode`, which runs the same loop, and by its own loop."""

    def encode(self, x: Tensor) -> Tensor:
        return super().decode(x)

    def decode(self, z: Tensor) -> Tensor:
        return super().decode(z) + self.encode(z)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", [Halves, Twice])
@torch.no_grad()
def test_a_method_with_a_long_loop_can_call_itself_and_other_methods_of_an_attached_model(kind: type[Video]) -> None:
    torch.manual_seed(0)
    model: Any = kind().eval()
    z = torch.randn(1, 4, FRAMES, 16, 8)
    expected = model.decode(z)
    with fxpass.parallelize(model, 2, executor="lockstep") as module:
        attach(module)
        for _ in range(2):
            torch.testing.assert_close(model.decode(z), expected)
        assert step_of(module).traffic["halo"] > 0
        assert "forward" not in vars(model.step)
        detach(module)


@torch.no_grad()
def test_a_strategy_with_stale_steps_leaves_the_loop_exact() -> None:
    model, z = video()
    with fxpass.parallelize(model, 2, executor="lockstep", strategy="displaced", warmup_steps=1) as module:
        torch.testing.assert_close(module.decode(z), model.decode(z))


@torch.no_grad()
def test_worker_processes_run_the_calls_of_a_loop() -> None:
    model, z = video()
    with fxpass.parallelize(model, 2, executor="spawn", timeout=60) as module:
        torch.testing.assert_close(module.decode(z), model.decode(z))
        assert step_of(module).traffic["halo"] > 0


@torch.no_grad()
def test_strict_refuses_a_long_loop() -> None:
    model, z = video()
    with pytest.raises(fxpass.CaptureError, match="more than 60 operators"):
        fxpass.parallelize(model, 2, executor="lockstep", strict=True).decode(z)


class Flat(Video):
    """The loop runs no module as a whole."""

    def decode(self, z: Tensor) -> Tensor:
        frames = [frame.sin().cos().tanh().exp() for frame in self.before(z).unbind(2)]
        return torch.stack([self.step(frames[0], [None]), self.step(frames[1], [None])], 2) + sum(frames).mean()


@torch.no_grad()
def test_a_loop_whose_work_is_in_no_module_runs_unsplit() -> None:
    torch.manual_seed(0)
    model: Any = Flat().eval()
    z = torch.randn(1, 4, FRAMES, 16, 8)
    with fxpass.parallelize(model, 2, executor="lockstep") as module:
        with pytest.warns(fxpass.FxpassWarning, match="decode runs unsplit .*more than 60 operators"):
            assert torch.equal(module.decode(z), model.decode(z))
        assert module._engine.loops is None


def test_the_outermost_modules_that_run_more_than_once_are_what_a_call_repeats() -> None:
    graph = torch.fx.Graph()
    weight, other = graph.placeholder("weight"), graph.placeholder("other")

    def work(path: str, count: int, read: torch.fx.Node = weight) -> None:
        for _ in range(count):
            graph.call_function(torch.sin, (read,)).meta["path"] = path

    runs = Runs()
    runs.enter("before", [""])
    work("before", 1)
    for _ in range(2):
        runs.enter("decoder", [""])
        for block in ("decoder.a", "decoder.b", "decoder.a"):
            runs.enter(block, ["", "decoder"])
            work(block, 3)
    work("", 99, other)
    assert runs.repeated([weight]) == ("decoder",)
    work("", 10)
    assert runs.repeated([weight]) == ()
