"""Following the advice of an error message solves the problem."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

import fxpass
from fxpass.ir.merge import Reduce
from fxpass.ir.step import ChannelSpec
from fxpass.runtime.calls.module import ParallelModule
from fxpass.runtime.calls.programs import SIGNATURES
from fxpass.runtime.lockstep import LockstepExecutor
from fxpass.runtime.spawn import SpawnExecutor
from tests.runtime.plans import Block, Pipeline, block, inputs, parallel, whole


def warned(action: Callable[[], Any], words: str) -> list[warnings.WarningMessage]:
    """The warnings with these words that an action gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [each for each in caught if words in str(each.message)]


def test_a_closed_module_is_replaced_when_parallelize_is_called_again() -> None:
    model = block()
    closed: Any = fxpass.parallelize(model, 2, executor="lockstep")
    closed.close()
    with pytest.raises(RuntimeError, match=r"call fxpass\.parallelize again"):
        closed(*inputs())
    module: Any = fxpass.parallelize(closed, 2, executor="lockstep")
    assert module is closed
    assert module.unwrapped is model
    torch.testing.assert_close(module(*inputs())["sample"], whole(model, *inputs()))


def test_a_pipeline_of_a_closed_module_gets_a_new_one_that_hears_of_generations() -> None:
    pipeline: Any = Pipeline(unet=block(), scheduler=DDIMScheduler())
    for count in (4, 5, 6):
        fxpass.parallelize(pipeline, 2, strategy="displaced", executor="lockstep")
        pipeline.scheduler.set_timesteps(count)
        heard = fxpass.parallel(pipeline.unet)._engine._generations.current()
        assert heard.announced
        assert len(heard.timesteps) == count
        fxpass.parallel(pipeline.unet).close()
    assert type(pipeline.unet) is Block


def test_after_an_interrupt_the_message_names_it_and_the_module_can_be_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = block()
    module = parallel(model, SpawnExecutor(2, timeout=60))
    module(*inputs())
    (entry,) = module._engine.programs.all()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(entry.loaded.steps, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module(*inputs())
    with pytest.raises(RuntimeError, match=r"in an earlier call: KeyboardInterrupt\); call fxpass\.parallelize again"):
        module(*inputs())
    again: Any = fxpass.parallelize(module, 2, executor="lockstep")
    assert type(again) is ParallelModule
    torch.testing.assert_close(again(*inputs())["sample"], whole(model, *inputs()))


def test_more_shapes_in_turn_than_programs_are_kept_give_one_hint_at_the_users_call() -> None:
    module = parallel(block(), LockstepExecutor(2))
    shapes = [16 + 2 * i for i in range(SIGNATURES + 2)]

    def in_turn() -> None:
        for rows in shapes:
            module(*inputs(rows))

    assert not warned(in_turn, "captured again")
    (hint,) = warned(in_turn, "captured again")
    assert f"the {SIGNATURES} latest kinds" in str(hint.message)
    assert hint.filename == __file__


def test_a_few_shapes_in_turn_give_no_hint() -> None:
    module = parallel(block(), LockstepExecutor(2))
    assert not warned(lambda: [module(*inputs(rows)) for rows in (16, 18) * 2], "captured again")


def test_an_exchange_is_called_by_its_name_and_module_once() -> None:
    total = Reduce("sum", (3,), torch.float32, 2)
    assert str(ChannelSpec("exchange_2", "mid.norm", (total,), False)).startswith("exchange_2 in mid.norm (")
