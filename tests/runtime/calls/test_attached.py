"""The parts of a pipeline stay the user's objects: only their calls run on all ranks."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import DDIMScheduler
from torch import Tensor, nn

import fxpass
from fxpass.runtime.calls.module import ParallelModule
from tests.runtime.plans import Block, Pipeline, block, inputs, whole


def said(action: Callable[[], Any], words: str) -> list[str]:
    """The warnings with these words that an action gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(each.message) for each in caught if words in str(each.message)]


def pipeline(**options: Any) -> Any:
    """A pipeline whose denoiser is split on two ranks."""
    made = Pipeline(unet=block(), scheduler=DDIMScheduler())
    return fxpass.parallelize(made, 2, executor="lockstep", **options)


def received(model: nn.Module) -> int:
    return sum(fxpass.parallel(model).traffic.values())


def assert_split(model: Any, expected: Tensor) -> None:
    """A call of the model gives this, and exchanges something."""
    before = received(model)
    torch.testing.assert_close(model(*inputs())["sample"], expected)
    assert received(model) > before


EXPECTED = whole(block(), *inputs())


def test_a_part_stays_the_same_object_with_its_class_and_signature() -> None:
    model = block()
    attributes, signature = set(vars(model)), inspect.signature(model.forward)
    pipe: Any = Pipeline(unet=model, scheduler=DDIMScheduler())
    fxpass.parallelize(pipe, 2, executor="lockstep")
    assert pipe.unet is model
    assert type(pipe.unet) is Block
    assert set(vars(model)) - attributes == {"forward"}
    assert inspect.signature(model.forward) == signature
    assert model.forward.__doc__ == Block.forward.__doc__
    assert_split(model, EXPECTED)
    assert fxpass.parallel(model).plan is not None


def test_parallel_finds_the_handle_of_a_part_or_says_what_to_do() -> None:
    pipe = pipeline()
    handle = fxpass.parallel(pipe.unet)
    assert type(handle) is ParallelModule
    assert fxpass.parallel(handle) is handle
    torch.testing.assert_close(handle(*inputs())["sample"], EXPECTED)
    assert len(handle._engine.programs) == 1
    pipe.unet(*inputs())
    assert len(handle._engine.programs) == 1  # the handle and the part share programs
    with pytest.raises(ValueError, match=r"Block is not parallel: call fxpass\.parallelize on it"):
        fxpass.parallel(block())


def test_restore_leaves_nothing_behind() -> None:
    model, scheduler = block(), DDIMScheduler()
    before = dict(vars(model)), dict(vars(scheduler))
    pipe: Any = Pipeline(unet=model, scheduler=scheduler)
    fxpass.parallelize(pipe, 2, executor="lockstep")
    handle = fxpass.parallel(model)
    model(*inputs())
    assert fxpass.restore(pipe) is pipe
    assert (dict(vars(model)), dict(vars(scheduler))) == before
    assert pipe.unet is model
    torch.testing.assert_close(model(*inputs())["sample"], EXPECTED)
    assert handle._engine.ended
    assert fxpass.restore(pipe) is pipe  # there is nothing to do any more


def test_restore_ends_a_part_that_was_replaced_since() -> None:
    pipe = pipeline()
    model, handle = pipe.unet, fxpass.parallel(pipe.unet)
    pipe.unet = block()
    fxpass.restore(pipe)
    assert handle._engine.ended
    assert "forward" not in vars(model)


def test_restore_refuses_what_is_neither_a_module_nor_a_pipeline() -> None:
    with pytest.raises(TypeError, match=r"restore takes an nn\.Module or a pipeline, not int"):
        fxpass.restore(3)


def test_restore_gives_the_model_back_of_a_module_too() -> None:
    model = block()
    module = fxpass.parallelize(model, 2, executor="lockstep")
    assert fxpass.restore(module) is model
    assert fxpass.restore(model) is model
    with pytest.raises(RuntimeError, match="was closed"):
        module(*inputs())


def test_restore_ends_the_worker_processes() -> None:
    pipe: Any = Pipeline(unet=block(), scheduler=DDIMScheduler())
    fxpass.parallelize(pipe, 2, executor="spawn", timeout=60)
    assert_split(pipe.unet, EXPECTED)
    executor: Any = fxpass.parallel(pipe.unet)._engine.executor
    (worker,) = executor.processes
    fxpass.restore(pipe)
    assert worker.poll() is not None
    torch.testing.assert_close(whole(pipe.unet, *inputs()), EXPECTED)


def test_a_part_that_is_parallel_already_is_split_anew_and_its_scheduler_announces_once() -> None:
    pipe = pipeline()
    handle, announced = fxpass.parallel(pipe.unet), pipe.scheduler.set_timesteps
    for ranks in (3, 2, 4):
        fxpass.parallelize(pipe, ranks, strategy="displaced", executor="lockstep")
        assert_split(pipe.unet, EXPECTED)
        assert fxpass.parallel(pipe.unet) is handle
        assert handle.plan is not None
        assert handle.plan.world_size == ranks
        assert len(handle._watches) == 1
        assert pipe.scheduler.set_timesteps.__func__.__wrapped__ is DDIMScheduler.set_timesteps
    assert pipe.scheduler.set_timesteps != announced
    fxpass.restore(pipe)
    assert "forward" not in vars(pipe.unet)


def test_the_scheduler_of_a_closed_module_announces_nothing() -> None:
    pipe: Any = Pipeline(unet=block(), prior=block(), scheduler=DDIMScheduler())
    fxpass.parallelize(pipe, 2, executor="lockstep")
    fxpass.parallel(pipe.unet).close()
    assert "set_timesteps" in vars(pipe.scheduler)  # the other one can still run
    fxpass.parallel(pipe.prior).close()
    assert "set_timesteps" not in vars(pipe.scheduler)
    with pytest.raises(RuntimeError, match=r"was closed .*; call fxpass\.parallelize again"):
        pipe.unet(*inputs())
    fxpass.parallelize(pipe, 2, executor="lockstep")
    assert_split(pipe.unet, EXPECTED)
    assert "set_timesteps" in vars(pipe.scheduler)


def test_pipelines_that_share_a_scheduler_leave_it_as_it_was_in_any_order() -> None:
    for order in ((0, 1), (1, 0)):
        scheduler = DDIMScheduler()
        pipes: list[Any] = [Pipeline(unet=block(), scheduler=scheduler) for _ in range(2)]
        for pipe in pipes:
            fxpass.parallelize(pipe, 2, strategy="displaced", executor="lockstep")
        scheduler.set_timesteps(6)
        for pipe in pipes:
            assert len(fxpass.parallel(pipe.unet)._engine._generations.current().timesteps) == 6
        for i in order:
            fxpass.restore(pipes[i])
        assert "set_timesteps" not in vars(scheduler)


def test_a_module_that_the_user_put_into_the_pipeline_becomes_a_part_like_any_other() -> None:
    model = block()
    pipe: Any = Pipeline(unet=fxpass.parallelize(model, 2, executor="lockstep"), scheduler=DDIMScheduler())
    handle = pipe.unet
    fxpass.parallelize(pipe, 3, executor="lockstep")
    assert pipe.unet is model
    assert fxpass.parallel(model) is handle
    assert_split(model, EXPECTED)


def test_a_deep_copy_of_a_part_runs_unsplit_and_says_so_once() -> None:
    pipe = pipeline()
    other = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        other.conv_out.weight.zero_()
    before = received(pipe.unet)
    assert len(said(lambda: [other(*inputs()), other(*inputs())], "is a copy of a parallel one, and runs unsplit")) == 1
    torch.testing.assert_close(whole(other, *inputs()), other.conv_out.bias.detach().view(-1, 1, 1).expand(2, 4, 16, 8))
    assert received(pipe.unet) == before
    second: Any = Pipeline(unet=copy.deepcopy(pipe.unet), scheduler=DDIMScheduler())
    fxpass.parallelize(second, 2, executor="lockstep")
    assert not said(lambda: assert_split(second.unet, EXPECTED), "copy")
    assert fxpass.restore(second).unet.forward.__func__ is Block.forward
    assert_split(pipe.unet, EXPECTED)


def test_a_part_can_be_pickled_and_loaded_unsplit() -> None:
    pipe = pipeline()
    loaded = pickle.loads(pickle.dumps(pipe.unet))
    torch.testing.assert_close(whole(loaded, *inputs()), EXPECTED)
    assert loaded.forward.__func__ is Block.forward


def test_a_pipeline_that_is_dropped_takes_its_workers_with_it() -> None:
    pipe = pipeline()
    pipe.unet(*inputs())
    scheduler, executor = pipe.scheduler, weakref.ref(fxpass.parallel(pipe.unet)._engine.executor)
    del pipe
    gc.collect()
    assert executor() is None
    scheduler.set_timesteps(3)  # it still refers to what has gone


class Doubling(ModelHook):
    """A hook like those for offloading, which moves nothing."""

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return {"sample": output["sample"] * 2}


def test_a_hook_that_was_there_first_and_is_set_again_does_not_drop_the_split() -> None:
    model = block()
    add_hook_to_module(model, Doubling())
    pipe: Any = Pipeline(unet=model, scheduler=DDIMScheduler())
    fxpass.parallelize(pipe, 2, executor="lockstep")
    assert_split(model, 2 * EXPECTED)
    for _ in range(2):
        remove_hook_from_module(model)  # as diffusers does after every generation
        add_hook_to_module(model, Doubling())
        pipe.scheduler.set_timesteps(3)
        assert_split(model, 2 * EXPECTED)
    remove_hook_from_module(model)
    pipe.scheduler.set_timesteps(3)
    assert_split(model, EXPECTED)
    fxpass.restore(pipe)
    torch.testing.assert_close(whole(model, *inputs()), EXPECTED)


def test_a_hook_that_is_set_later_runs_around_the_split() -> None:
    pipe = pipeline()
    add_hook_to_module(pipe.unet, Doubling())
    pipe.scheduler.set_timesteps(3)
    assert_split(pipe.unet, 2 * EXPECTED)
    remove_hook_from_module(pipe.unet)
    assert_split(pipe.unet, EXPECTED)
    add_hook_to_module(pipe.unet, Doubling())
    fxpass.restore(pipe)
    torch.testing.assert_close(whole(pipe.unet, *inputs()), 2 * EXPECTED)


def test_a_forward_hook_of_a_part_runs_once_in_each_call() -> None:
    pipe = pipeline()
    seen: list[float] = []
    pipe.unet.register_forward_hook(lambda module, args, output: seen.append(float(output["sample"].sum())))
    for _ in range(3):
        pipe.unet(*inputs())
    assert len(seen) == 3
    assert fxpass.parallel(pipe.unet)._engine.programs.in_a_row == 0  # what it does is no part of the program
    torch.testing.assert_close(seen[0], float(EXPECTED.sum()), rtol=1e-3, atol=1e-3)


def test_a_part_that_calls_itself_is_split_as_one_call() -> None:
    class Twice(Block):
        def forward(self, sample: Tensor, timestep: Tensor, again: bool = True) -> Any:
            result = super().forward(sample, timestep)
            return self(result["sample"], timestep, again=False) if again else result

    torch.manual_seed(0)
    model = Twice().eval()
    expected = whole(model, *inputs())
    pipe: Any = Pipeline(unet=model, scheduler=DDIMScheduler())
    fxpass.parallelize(pipe, 2, executor="lockstep")
    assert_split(model, expected)
    assert len(fxpass.parallel(model)._engine.programs) == 1


def test_a_part_that_changes_is_captured_again_and_otherwise_not() -> None:
    pipe = pipeline()
    engine: Any = fxpass.parallel(pipe.unet)._engine
    for _ in range(3):
        assert_split(pipe.unet, EXPECTED)
    assert engine.programs.in_a_row == 0
    pipe.unet.scale = 2.0
    assert_split(pipe.unet, 2 * EXPECTED)
    assert len(engine.programs) == 1


def test_a_part_runs_under_torch_compile_and_a_warning_names_the_option() -> None:
    torch.compiler.reset()
    pipe = pipeline()
    compiled: Any = torch.compile(pipe.unet, backend="eager")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(compiled(*inputs())["sample"], EXPECTED)
    assert received(pipe.unet)
    torch.compiler.reset()


class Ending(Pipeline):
    """A pipeline that ends its calls as those of diffusers do."""

    def maybe_free_model_hooks(self) -> None:
        pass

    def __call__(self, steps: int = 2) -> None:
        self.scheduler.set_timesteps(steps)
        for time in self.scheduler.timesteps:
            self.unet(inputs()[0], time[None] / 1000)
        self.maybe_free_model_hooks()


def test_a_call_of_a_pipeline_that_uses_another_module_warns_once() -> None:
    pipe: Any = Ending(unet=block(), scheduler=DDIMScheduler())
    fxpass.parallelize(pipe, 2, executor="lockstep")
    assert not said(pipe, "without a call")
    pipe.unet, kept = block(), pipe.unet
    (warning,) = said(lambda: [pipe(), pipe()], "without a call")
    assert warning.startswith("Ending ran without a call of unet (Block), so nothing there was split")
    pipe.unet = kept
    fxpass.restore(pipe)
    assert "maybe_free_model_hooks" not in vars(pipe)


def test_the_parts_of_a_pipeline_share_worker_processes_until_the_last_is_closed() -> None:
    pipe: Any = Pipeline(unet=block(), prior=block(1, 32), scheduler=DDIMScheduler())
    other = whole(pipe.prior, *inputs())
    fxpass.parallelize(pipe, 2, executor="spawn", timeout=60)
    for _ in range(2):
        assert_split(pipe.unet, EXPECTED)
        assert_split(pipe.prior, other)  # its weights have the same names
    unet, prior = (fxpass.parallel(model) for model in (pipe.unet, pipe.prior))
    (worker,) = unet._engine.executor.processes
    assert prior._engine.executor.processes == [worker]
    unet.close()
    assert worker.poll() is None
    assert_split(pipe.prior, other)
    prior.close()
    assert worker.poll() is not None


def test_a_worker_that_fails_ends_all_parts_and_parallelize_replaces_it() -> None:
    pipe: Any = Pipeline(unet=block(), prior=block(1, 32), scheduler=DDIMScheduler())
    fxpass.parallelize(pipe, 2, executor="spawn", timeout=60)
    pipe.unet(*inputs())
    pipe.prior(*inputs())
    (worker,) = fxpass.parallel(pipe.unet)._engine.executor.processes
    worker.kill()
    with pytest.raises(fxpass.RankError, match="SIGKILL"):
        pipe.unet(*inputs())
    with pytest.raises(RuntimeError, match=r"worker processes have ended.*call fxpass\.parallelize again"):
        pipe.prior(*inputs())
    fxpass.parallelize(pipe, 2, executor="spawn", timeout=60)
    assert_split(pipe.unet, EXPECTED)
    fxpass.restore(pipe)
