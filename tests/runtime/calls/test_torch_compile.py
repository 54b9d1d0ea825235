"""torch.compile meets a parallel module: it runs as it is, and a warning says what to use instead."""

import warnings
from collections.abc import Callable, Iterator
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxpass.runtime.calls.module import ParallelModule, _warn_of_compile
from fxpass.runtime.lockstep import LockstepExecutor
from tests.runtime.plans import block, inputs, parallel, whole

Compiled = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def nothing_said_yet() -> Iterator[None]:
    """No warning was given and nothing was compiled before a test, or after it."""
    _warn_of_compile.cache_clear()
    torch.compiler.reset()
    yield
    _warn_of_compile.cache_clear()
    torch.compiler.reset()


def wrapper_compiled(module: ParallelModule) -> Compiled:
    compiled: Any = torch.compile(module, backend="eager")
    return lambda *args: compiled(*args)["sample"]


def compiled_in_place(module: ParallelModule) -> Compiled:
    module.compile(backend="eager")
    return lambda *args: module(*args)["sample"]


def called_by_a_compiled_function(module: ParallelModule) -> Compiled:
    return torch.compile(lambda x, t: module(x * 1, t)["sample"] * 1, backend="eager")


def part_of_a_compiled_module(module: ParallelModule) -> Compiled:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.inner(x * 1, t)["sample"] * 1

    compiled: Any = torch.compile(Outer().eval(), backend="eager")
    return compiled


def within(seconds: float, action: Callable[[], None]) -> None:
    """Run an action that may hang: fail after so many seconds."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            raised.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"still running after {seconds:g} s"
    if raised:
        raise raised[0]


@pytest.mark.parametrize(
    "use", [wrapper_compiled, compiled_in_place, called_by_a_compiled_function, part_of_a_compiled_module]
)
def test_a_parallel_module_runs_under_torch_compile_and_one_warning_names_the_option(
    use: Callable[[ParallelModule], Compiled],
) -> None:
    model = block()
    module = parallel(model, LockstepExecutor(2))

    def twice() -> None:
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            compiled = use(module)
            for seed in (0, 1):
                torch.testing.assert_close(compiled(*inputs(seed=seed)), whole(model, *inputs(seed=seed)))
        assert [str(each.message) for each in caught if "compile=True" in str(each.message)] == [
            "torch.compile leaves a parallel module as it is; to compile it, call fxpass.parallelize(…, compile=True)"
        ]
        assert module.traffic["output"] > 0

    within(60, twice)
    assert model._compiled_call_impl is None


def test_one_graph_of_a_parallel_module_is_refused_with_the_option_to_use() -> None:
    module = parallel(block(), LockstepExecutor(2))
    whole_graph = torch.compile(lambda x, t: module(x, t)["sample"], backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="compile=True"):
        whole_graph(*inputs())


@pytest.mark.parametrize("use", ["call", "reset", "close"])
def test_a_model_that_uses_its_own_wrapper_gets_an_error_and_does_not_wait_for_itself(use: str) -> None:
    model = block()
    module = parallel(model, LockstepExecutor(2))
    actions = {"call": lambda: module(*inputs()), "reset": module.reset, "close": module.close}
    model.conv_in.register_forward_hook(lambda *_: actions[use]() and None)

    def call() -> None:
        with pytest.raises(RuntimeError, match=r"within one of its own calls.*use its \.unwrapped model"):
            module(*inputs())

    within(60, call)
