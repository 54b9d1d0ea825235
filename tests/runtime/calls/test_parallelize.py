"""`parallelize`: options that are refused, pipelines, strategies, and models and inputs of unusual kinds."""

import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

import fxpass
from fxpass.models.small import case
from fxpass.runtime.lockstep import LockstepExecutor
from tests.runtime.plans import Pipeline, block, inputs, parallel, whole


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"world_size": 0}, ValueError, "at least 1"),
        ({"world_size": True}, ValueError, "at least 1"),
        ({"world_size": 2.0}, ValueError, "whole number"),
        ({"world_size": 2, "strategy": "synk"}, ValueError, "did you mean 'sync'"),
        ({"world_size": 2, "warmup_steps": 3}, ValueError, "no effect on 'sync'"),
        ({"world_size": 2, "strategy": "displaced", "warmup_steps": 1.5}, ValueError, "number of steps"),
        ({"world_size": 2, "strategy": "ulysses"}, ValueError, "choose one of sync, displaced"),
        ({"world_size": 2, "executor": "spwan"}, ValueError, "did you mean 'spawn'"),
        ({"world_size": 2, "executor": "distributed"}, RuntimeError, "torchrun"),
        ({"world_size": 2, "strategy": 7}, ValueError, "not 7"),
        ({"world_size": 2, "executor": None}, ValueError, "choose one of"),
        ({"world_size": 2, "target": "tpu"}, ValueError, "targets are"),
        ({"world_size": 2, "timeout": 0}, ValueError, "above 0"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        fxpass.parallelize(block(), **options)


def test_an_object_that_is_not_a_module_is_refused() -> None:
    with pytest.raises(TypeError, match="pipeline"):
        fxpass.parallelize("a model", 2)


def test_a_parallel_module_is_split_anew_by_the_latest_arguments() -> None:
    module: Any = fxpass.parallelize(block(), 2, executor="lockstep")
    for ranks, strategy in ((2, "sync"), (3, "displaced"), (4, "sync")):
        assert fxpass.parallelize(module, ranks, strategy=strategy, executor="lockstep") is module
        torch.testing.assert_close(module(*inputs())["sample"], whole(module.unwrapped, *inputs()))
        assert (module.plan.world_size, module.plan.strategy.name) == (ranks, strategy)


def test_wrong_arguments_leave_a_pipeline_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe: Any = Pipeline(transformer=block(), transformer_2=block(), scheduler=DDIMScheduler())
    with pytest.raises(RuntimeError, match="torchrun"):
        fxpass.parallelize(pipe, 2, executor="distributed")
    assert "forward" not in vars(pipe.transformer)
    assert "set_timesteps" not in vars(pipe.scheduler)


def test_a_function_is_not_a_model() -> None:
    with pytest.raises(TypeError, match=r"nn\.Module, not function"):
        fxpass.plan(lambda x: x, torch.ones(2), world_size=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("world_size", [0, -1, "2", True, None, 1.5])
def test_a_plan_is_for_a_whole_number_of_ranks(world_size: Any) -> None:
    with pytest.raises(ValueError, match="whole number of at least 1"):
        fxpass.plan(block(), *inputs(), world_size=world_size)


@pytest.fixture
def pipeline() -> diffusers.DDIMPipeline:
    unet: Any = case("unet_2d").build()
    pipe = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler(num_train_timesteps=10))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_pipeline_runs_with_its_denoiser_split_in_place(pipeline: diffusers.DDIMPipeline, tmp_path: Path) -> None:
    def picture() -> Any:
        generator = torch.Generator().manual_seed(0)
        return pipeline(generator=generator, num_inference_steps=2, output_type="np").images

    pipeline.unet.register_to_config(sample_size=16)
    expected = picture()
    original = pipeline.unet
    assert fxpass.parallelize(pipeline, 1) is pipeline
    assert pipeline.unet is original
    assert type(pipeline.unet) is diffusers.UNet2DModel
    assert (picture() == expected).all()
    assert fxpass.parallel(pipeline.unet).plan is not None
    assert pipeline.to(torch.float64).unet is original
    assert original.dtype == torch.float64
    pipeline.to(torch.float32).save_pretrained(tmp_path)
    loaded = diffusers.DDIMPipeline.from_pretrained(tmp_path)
    assert type(loaded.unet) is diffusers.UNet2DModel


class Scaled(nn.Module):
    """A number that is ignored where it is a tensor, and a plain tensor that is folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.k = torch.ones(1)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = self.conv(x) * (self.k * 2)
        return y * scale if isinstance(scale, int | float) else y


def test_a_number_that_is_ignored_as_a_tensor_stays_a_number() -> None:
    model, x = Scaled().eval(), torch.randn(1, 2, 8, 8)
    module: Any = fxpass.parallelize(model, 2, executor="lockstep")
    for scale in (1.0, 0.5):
        torch.testing.assert_close(module(x, scale), model(x, scale).detach())


def test_a_plain_tensor_attribute_may_change_as_often_as_it_likes() -> None:
    model, x = Scaled().eval(), torch.randn(1, 2, 8, 8)
    module: Any = fxpass.parallelize(model, 2, executor="lockstep")
    for step in range(7):
        if step % 2:
            model.k.fill_(step)
        else:
            model.k = torch.full((1,), float(step + 1))
        torch.testing.assert_close(module(x), model(x).detach())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"halo": "fresh"}, r"Strategy\.halo is one of sync, stale, frozen, local, not 'fresh'"),
        ({"keys_values": "corrected"}, r"Strategy\.keys_values is one of sync, stale, frozen, local, not 'corrected'"),
        (
            {"moments": "old"},
            r"Strategy\.moments is one of sync, stale, predicted, corrected, frozen, local, not 'old'",
        ),
        ({"keys_values": "stale", "window": 1.5}, r"Strategy\.window .* not 1\.5"),
        ({"keys_values": "stale", "window": 0}, r"Strategy\.window .* not 0"),
        ({"keys_values": "stale", "window": (0.5, -1)}, r"Strategy\.window .* not \(0\.5, -1\)"),
        ({"forecast": 1.5}, r"Strategy\.forecast .* not 1\.5"),
        ({"window": 0.5}, r"Strategy\.keys_values is 'sync'"),
        ({"keys_values": "stale", "bits": 3}, r"Strategy\.bits is 2, 4, 8, or 0 .* not 3"),
        ({"cooldown_steps": 0.5}, r"Strategy\.cooldown_steps .* not 0\.5"),
        ({"warmup_steps": -1}, r"Strategy\.warmup_steps .* not -1"),
    ],
)
def test_a_strategy_of_unknown_values_cannot_be_made(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fxpass.Strategy(**fields)


def test_inputs_without_rows_are_named() -> None:
    with pytest.raises(ValueError, match=r"none of its inputs has rows to cut.*input \[8\]"):
        fxpass.plan(torch.nn.Linear(8, 8), torch.randn(8), world_size=2)


@pytest.mark.parametrize("shape", [(0, 4, 8, 8), (0, 6, 4)])
def test_an_empty_batch_is_run_by_every_rank(shape: tuple[int, ...]) -> None:
    model = nn.Conv2d(4, 5, 3).eval() if len(shape) == 4 else nn.Linear(4, 5).eval()
    module = fxpass.parallelize(model, 2, executor="lockstep")
    assert module(torch.randn(shape)).shape == model(torch.randn(shape)).shape


@pytest.mark.parametrize("compile", ["cudagraphs", 1.5, None])
def test_an_unknown_way_to_compile_is_refused_with_those_there_are(compile: Any) -> None:  # noqa: A002
    with pytest.raises(ValueError, match="compile is True, False, 'inductor', 'graph', 'inductor\\+graph', not"):
        fxpass.parallelize(block(), 2, executor="lockstep", compile=compile)


@pytest.mark.parametrize("executor", ["lockstep", "spawn"])
def test_graphs_of_a_model_on_the_cpu_are_refused(executor: str) -> None:
    with pytest.raises(ValueError, match="records CUDA graphs, but the model is on cpu; use compile=True"):
        fxpass.parallelize(block(), 2, executor=executor, compile="graph")(*inputs())


def test_a_model_that_computes_nothing_gives_its_input_back() -> None:
    x = torch.randn(1, 4, 8)
    assert fxpass.parallelize(nn.Identity().eval(), 2, executor="lockstep")(x) is x


def test_a_release_that_fails_still_closes_the_executor() -> None:
    executor = LockstepExecutor(2)
    module = parallel(block(), executor)
    module(*inputs())
    (entry,) = module._engine.programs.all()
    closed: list[bool] = []
    executor.close = lambda: closed.append(True)
    entry.loaded.release = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        module.close()
    assert closed == [True]
    assert len(module._engine.programs) == 0


def test_a_stale_strategy_warns_where_all_steps_will_be_exact() -> None:
    model = torch.nn.Conv2d(4, 4, 3, padding=1).eval()
    module = fxpass.parallelize(model, 2, strategy="displaced", executor="lockstep")
    with pytest.warns(UserWarning, match=r"no input that is known to be a timestep \(its inputs: input\)"):
        module(torch.randn(1, 4, 16, 8))
    pipeline = Pipeline(unet=block(), scheduler=DDIMScheduler())
    whole = copy.deepcopy(pipeline.unet)
    fxpass.parallelize(pipeline, 2, strategy="displaced", executor="lockstep")
    with pytest.warns(UserWarning, match=r"no step of this generation was displaced.*warmup_steps is 4\): 4 of 4"):
        assert errors(pipeline, whole, 4) == [True] * 4


def test_a_pipelines_last_step_is_exact_and_a_reset_by_hand_forgets_which_it_was() -> None:
    pipeline = Pipeline(unet=block(), scheduler=DDIMScheduler(clip_sample=False))
    whole = copy.deepcopy(pipeline.unet)
    fxpass.parallelize(pipeline, 2, strategy="displaced", warmup_steps=1, executor="lockstep")
    assert errors(pipeline, whole, 12) == [True, *[False] * 10, True]
    fxpass.parallel(pipeline.unet).reset()
    assert errors(pipeline, whole, 12, announced=False) == [True, *[False] * 11]


def test_a_scheduler_that_replaces_the_pipelines_announces_its_generations_too() -> None:
    pipeline = Pipeline(unet=block(), scheduler=DDIMScheduler(clip_sample=False))
    whole = copy.deepcopy(pipeline.unet)
    fxpass.parallelize(pipeline, 2, strategy="displaced", warmup_steps=1, executor="lockstep")
    for _ in range(2):
        pipeline.scheduler = DDIMScheduler(clip_sample=False)
        for steps in (12, 8):  # the first is found at its first call, the second by the scheduler itself
            assert errors(pipeline, whole, steps) == [True, *[False] * (steps - 2), True]


def errors(pipeline: Any, whole: torch.nn.Module, steps: int, announced: bool = True) -> list[bool]:
    """Which steps of a generation equal the unsplit model's on the same input."""
    scheduler: Any = pipeline.scheduler if announced else DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(steps)
    sample, equal = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), []
    for time in scheduler.timesteps:
        with torch.no_grad():
            (expected,) = whole(sample, time / 1000, return_dict=False)
        (found,) = pipeline.unet(sample, time / 1000, return_dict=False)
        equal.append(bool((found - expected).abs().max() <= 1e-5 * expected.abs().max()))
        sample = scheduler.step(expected, time, sample).prev_sample
    return equal


def test_a_split_that_is_slower_than_one_rank_is_warned_of_once_if_the_link_is_given() -> None:
    given: list[dict[str, Any]] = [{"link": "cpu"}, {"target": "cpu"}]
    for options in given:
        split: Any = fxpass.parallelize(block(), 2, executor="lockstep", **options)
        with pytest.warns(fxpass.FxpassWarning, match="2 ranks over cpu would be slower than 1") as warned:
            split(*inputs())
        assert len(warned) == 1
        split(*inputs(rows=24))  # another plan
    plain: Any = fxpass.parallelize(block(), 2, executor="lockstep")
    plain(*inputs())
