"""The ComfyUI node, driven as ComfyUI's sampler drives it: what it calls is imitated here."""

from __future__ import annotations

import copy
import gc
import importlib.util
import itertools
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpass
from fxpass.ir.step import Step
from fxpass.runtime.calls.module import ParallelModule
from fxpass.runtime.lockstep import LockstepPlan
from fxpass.runtime.spawn import SpawnPlan
from tests.runtime.test_spawn import gone

SPEC = importlib.util.spec_from_file_location("node", Path(__file__).parents[1] / "examples/comfyui/__init__.py")
assert SPEC is not None
assert SPEC.loader is not None
node: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(node)
SPLIT = node.NODE_CLASS_MAPPINGS["FxpassSplitOverGPUs"]


class Denoiser(nn.Module):
    """A diffusion model with the signature of ComfyUI's, which notes in its options where it is, as theirs do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.text = nn.Linear(8, 16)
        self.conv_out = nn.Conv2d(16, 4, 3, padding=1)
        self.dtype = torch.float32

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        y: Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 - as there
        **kwargs: Any,
    ) -> Tensor:
        transformer_options["block"] = ("input", 0)
        patches = transformer_options.get("patches", {})
        h = self.conv_in(x) + (timesteps / 1000)[:, None, None, None]
        transformer_options["block"] = ("middle", 0)
        tokens = self.norm(h).flatten(2).transpose(1, 2)
        tokens = tokens + nn.functional.scaled_dot_product_attention(
            self.query(tokens), self.key(tokens), self.value(tokens)
        )
        for patch in patches.get("attn1_patch", []):
            tokens = patch(tokens, transformer_options)
        tokens = tokens + self.text(context).mean(1, keepdim=True)
        return self.conv_out(tokens.transpose(1, 2).reshape(h.shape))


class Sampling:
    """Sigmas and timesteps of the kind that flow models have."""

    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma * 1000


class BaseModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.diffusion_model = Denoiser().requires_grad_(False).eval()
        self.model_sampling = Sampling()

    def apply_model(
        self,
        x: Tensor,
        t: Tensor,
        c_crossattn: Tensor,
        control: Any = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 - as there
    ) -> Tensor:
        options = transformer_options.copy()
        time = self.model_sampling.timestep(t).float()
        output = self.diffusion_model(x, time, context=c_crossattn, control=control, transformer_options=options)
        return x - output * t[:, None, None, None]


class ModelPatcher:
    def __init__(self, model: BaseModel, options: dict[str, Any] | None = None) -> None:
        self.model = model
        self.model_options = options or {"transformer_options": {}}

    def clone(self) -> ModelPatcher:
        return ModelPatcher(self.model, copy.deepcopy(self.model_options))

    def set_model_unet_function_wrapper(self, wrapper: Callable[..., Any]) -> None:
        self.model_options["model_function_wrapper"] = wrapper


def euler(slope: Callable[[Tensor, Tensor], Tensor], x: Tensor, now: Tensor, after: Tensor) -> Tensor:
    return x + slope(x, now) * (after - now)


def heun(slope: Callable[[Tensor, Tensor], Tensor], x: Tensor, now: Tensor, after: Tensor) -> Tensor:
    """Calls at the next sigma, where the next step calls again."""
    first = slope(x, now)
    if not after:
        return x + first * (after - now)
    return x + (first + slope(x + first * (after - now), after)) / 2 * (after - now)


def dpm_2(slope: Callable[[Tensor, Tensor], Tensor], x: Tensor, now: Tensor, after: Tensor) -> Tensor:
    """Calls at a sigma between two."""
    if not after:
        return euler(slope, x, now, after)
    middle = (now * after).sqrt()
    return x + slope(euler(slope, x, now, middle), middle) * (after - now)


def sample(
    patcher: ModelPatcher,
    steps: int = 8,
    seed: int = 0,
    step: Callable[..., Tensor] = euler,
    sigmas: Tensor | None = None,
    context: Tensor | None = None,
) -> Tensor:
    """A picture with guidance, sampled as there: both branches in one batch, options made anew for each call."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 4, 16, 8, generator=generator)
    context = torch.randn(2, 6, 8, generator=generator) if context is None else context
    sigmas = torch.linspace(1, 0, steps + 1) if sigmas is None else sigmas
    names = [uuid.uuid4(), uuid.uuid4()]

    def slope(x: Tensor, sigma: Tensor) -> Tensor:
        options = copy.copy(patcher.model_options["transformer_options"])
        options |= {"sample_sigmas": sigmas, "sigmas": sigma[None], "cond_or_uncond": [1, 0], "uuids": names}
        call = {
            "input": torch.cat([x, x]),
            "timestep": sigma.expand(2),
            "c": {"c_crossattn": context, "transformer_options": options},
            "cond_or_uncond": [1, 0],
        }
        wrapper = patcher.model_options.get("model_function_wrapper")
        if wrapper is None:
            output = patcher.model.apply_model(call["input"], call["timestep"], **call["c"])
        else:
            output = wrapper(patcher.model.apply_model, call)
        without, guided = output.chunk(2)
        denoised = without + 3 * (guided - without)
        return (x - denoised) / sigma

    for now, after in itertools.pairwise(sigmas):
        x = step(slope, x, now, after)
    return x


@pytest.fixture
def loaded() -> Iterator[ModelPatcher]:
    """A model loaded under inference mode, in which ComfyUI does everything."""
    with torch.inference_mode():
        torch.manual_seed(0)
        yield ModelPatcher(BaseModel())


def module_of(patcher: ModelPatcher) -> Any:
    return patcher.model_options["model_function_wrapper"]._module


def test_the_node_gives_the_picture_of_the_unsplit_model(loaded: ModelPatcher) -> None:
    (split,) = SPLIT().split(loaded, gpus=2, guidance=False, strategy="sync", compile=False)
    for seed in (0, 1):
        torch.testing.assert_close(sample(split, seed=seed), sample(loaded, seed=seed))
    assert type(loaded.model.diffusion_model) is Denoiser
    assert "model_function_wrapper" not in loaded.model_options
    module = module_of(split)
    assert module.traffic["keys_values"]
    assert len(module._engine.programs) == 2  # the second one leaves out what differs from prompt to prompt
    torch.testing.assert_close(sample(split, seed=2), sample(loaded, seed=2))
    assert len(module._engine.programs) == 2
    (worker,) = (process.pid for process in module._engine.executor.processes)
    weight = loaded.model.diffusion_model.conv_in.weight
    weight.data.copy_(1.5 * weight)  # as ComfyUI puts a LoRA into a weight
    torch.testing.assert_close(sample(split), sample(loaded))
    del split, module
    gc.collect()
    assert gone([worker])


def test_the_branches_of_guidance_run_on_different_gpus_and_only_outputs_travel(loaded: ModelPatcher) -> None:
    (split,) = SPLIT().split(loaded, gpus=2, guidance=True, strategy="sync", compile=False)
    torch.testing.assert_close(sample(split), sample(loaded))
    assert module_of(split).traffic.keys() == {"output"}
    module_of(split).close()


def test_each_picture_is_announced_so_that_its_first_and_last_steps_are_exact(
    loaded: ModelPatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact: list[bool] = []
    run = SpawnPlan.run

    def noted(self: SpawnPlan, weights: Any, inputs: Any, step: Step) -> list[Tensor]:
        exact.append(step.exact)
        return run(self, weights, inputs, step)

    monkeypatch.setattr(SpawnPlan, "run", noted)
    (split,) = SPLIT().split(loaded, gpus=2, guidance=False, strategy="displaced", compile=False)
    for seed in (0, 1):
        exact.clear()
        expected, found = sample(loaded, steps=12, seed=seed), sample(split, steps=12, seed=seed)
        assert exact == [True] * 4 + [False] * 7 + [True]
        assert 0 < (found - expected).norm() < 0.02 * expected.norm()
    module_of(split).close()


@pytest.mark.parametrize(
    ("step", "executor", "plan"),
    [(euler, "spawn", SpawnPlan), (heun, "lockstep", LockstepPlan), (dpm_2, "lockstep", LockstepPlan)],
)
def test_a_picture_reads_no_state_of_the_one_before_whose_sigmas_it_shares(
    loaded: ModelPatcher, step: Callable[..., Tensor], executor: str, plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which steps are exact is decided alike whatever runs them: workers for one sampler will do."""
    announced: list[list[float]] = []
    exact: list[bool] = []
    reset, run = ParallelModule.reset, plan.run

    def begun(self: ParallelModule, timesteps: Any) -> None:
        announced.append(timesteps)
        reset(self, timesteps)

    def noted(self: Any, weights: Any, inputs: Any, step: Step) -> list[Tensor]:
        exact.append(step.exact)
        return run(self, weights, inputs, step)

    def split_by(model: Any, executor: str, **options: Any) -> Any:
        return fxpass.parallelize(model, executor=chosen, **options)

    chosen = executor
    monkeypatch.setattr(node, "fxpass", SimpleNamespace(parallelize=split_by))
    monkeypatch.setattr(ParallelModule, "reset", begun)
    monkeypatch.setattr(plan, "run", noted)
    (split,) = SPLIT().split(loaded, gpus=2, guidance=False, strategy="displaced", compile=False)
    sigmas, context = torch.linspace(1, 0, 13), torch.randn(2, 6, 8)
    sample(split, seed=1, step=step, sigmas=sigmas, context=context)
    assert len(announced) == 1
    exact.clear()
    found = sample(split, seed=2, step=step, sigmas=sigmas, context=context)  # a cached node gives the same tensor
    assert len(announced) == 2
    assert exact[:4] == [True] * 4
    assert exact[-1]
    assert not all(exact)
    expected = sample(loaded, seed=2, step=step, sigmas=sigmas, context=context)
    assert (found - expected).norm() < 0.02 * expected.norm()
    module_of(split).close()
    (alone,) = SPLIT().split(loaded, gpus=2, guidance=False, strategy="displaced", compile=False)
    assert torch.equal(found, sample(alone, seed=2, step=step, sigmas=sigmas, context=context))
    module_of(alone).close()


def test_what_other_nodes_have_put_around_the_call_stays_and_runs_within(loaded: ModelPatcher) -> None:
    seen: list[type] = []

    def around(apply_model: Any, call: dict[str, Any]) -> Tensor:
        seen.append(type(apply_model.__self__.diffusion_model))
        return 0.5 * apply_model(call["input"], call["timestep"], **call["c"])

    loaded.set_model_unet_function_wrapper(around)
    (split,) = SPLIT().split(loaded, gpus=2, guidance=False, strategy="sync", compile=False)
    found = sample(split, steps=2)
    assert seen == [ParallelModule] * 2
    torch.testing.assert_close(found, sample(loaded, steps=2))
    module_of(split).close()


def test_copies_of_the_model_share_its_workers_and_a_failed_call_begins_with_new_ones(loaded: ModelPatcher) -> None:
    (split,) = SPLIT().split(loaded, gpus=2, guidance=False, strategy="sync", compile=False)
    expected = sample(split, steps=2)
    copied = split.clone()
    assert module_of(copied) is module_of(split)
    (worker,) = module_of(split)._engine.executor.processes
    worker.kill()
    with pytest.raises(fxpass.RankError, match="SIGKILL"):
        sample(copied, steps=2)
    assert module_of(split) is None
    assert type(loaded.model.diffusion_model) is Denoiser
    assert torch.equal(sample(split, steps=2), expected)
    module_of(split).close()


def test_a_model_that_cannot_be_split_stops_the_sampler_with_the_reason(loaded: ModelPatcher) -> None:
    def noise(tokens: Tensor, options: dict[str, Any]) -> Tensor:
        return tokens + torch.randn_like(tokens)

    loaded.model_options["transformer_options"]["patches"] = {"attn1_patch": [noise]}
    (split,) = SPLIT().split(loaded, gpus=2, guidance=False, strategy="sync", compile=False)
    with pytest.raises(fxpass.CaptureError, match="random"):
        sample(split, steps=2)
    assert type(loaded.model.diffusion_model) is Denoiser


def test_the_node_declares_what_comfyui_reads() -> None:
    inputs = SPLIT.INPUT_TYPES()["required"]
    assert list(inputs) == ["model", "gpus", "guidance", "strategy", "compile"]
    assert inputs["strategy"][0][0] == "sync"
    for name in inputs["strategy"][0]:
        fxpass.Strategy.of(name)
    assert callable(getattr(SPLIT, SPLIT.FUNCTION))
    assert SPLIT.RETURN_TYPES == ("MODEL",)
    assert node.NODE_DISPLAY_NAME_MAPPINGS.keys() == node.NODE_CLASS_MAPPINGS.keys()
