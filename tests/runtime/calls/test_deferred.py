"""Guidance in two calls: the first one waits for the second, and both run at once, each on a group of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpass
from fxpass.ir.advice import FxpassWarning
from fxpass.ir.mesh import Mesh
from fxpass.runtime.calls.deferred import DeferredTensor, Source
from fxpass.runtime.calls.together import GENERATIONS
from fxpass.runtime.lockstep import LockstepExecutor, LockstepPlan
from tests.runtime.plans import Block, block, inputs, steps, whole


def lockstep(world: int = 2, model: nn.Module | None = None, cfg: int = 2, **named: Any) -> Any:
    return fxpass.parallelize(model or block(), world, cfg=cfg, executor="lockstep", **named)


def branches(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Two samples, and a timestep."""
    sample, timestep = inputs(seed=seed)
    return sample[:1], sample[1:], timestep


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The inputs of all runs of plans."""
    found: list[Any] = []
    original = LockstepPlan.run

    def run(self: LockstepPlan, weights: Any, given: Any, step: Any) -> Any:
        found.append(given)
        return original(self, weights, given, step)

    monkeypatch.setattr(LockstepPlan, "run", run)
    return found


def test_two_calls_run_at_once_and_exchange_nothing_but_the_outputs(runs: list[Any]) -> None:
    module, (one, two, timestep) = lockstep(), branches()
    for count in (1, 2):
        first = module(one, timestep)["sample"]
        assert isinstance(first, DeferredTensor)
        assert len(runs) == count - 1
        second = module(two, timestep)["sample"]
        assert type(second) is Tensor
        assert len(runs) == count
        torch.testing.assert_close(first + 0, whole(block(), one, timestep))
        torch.testing.assert_close(second, whole(block(), two, timestep))
    assert module.plan.mesh == Mesh(2, 1)
    assert module.plan.calls == 2
    assert module.traffic == {"output": 2 * second.nbytes}


def test_three_branches_on_six_ranks() -> None:
    module, (one, two, timestep) = lockstep(6, cfg=3), branches()
    found = [module(x, timestep)["sample"] for x in (one, two, one - two)]
    assert module.plan.mesh == Mesh(3, 2)
    for x, result in zip((one, two, one - two), found, strict=True):
        torch.testing.assert_close(result + 0, whole(block(), x, timestep))


@pytest.mark.parametrize("strategy", ["displaced", "compressed"])
def test_displaced_steps_of_a_branch_are_those_of_a_patch_world_of_its_own(strategy: str) -> None:
    named: dict[str, Any] = {"strategy": strategy, "warmup_steps": 2}
    both = lockstep(4, **named)
    alone = [fxpass.parallelize(block(), 2, executor="lockstep", **named) for _ in range(2)]
    for sample, timestep in steps(6):
        parts = sample.split(1)
        found = [both(part, timestep)["sample"] for part in parts]
        for part, result, module in zip(parts, found, alone, strict=True):
            other: Any = module(part, timestep)
            assert torch.equal(result + 0, other["sample"])
    assert set(both.plan.bytes_by_role) > {"halo", "keys_values"}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :2],
        lambda x: x[0],
        lambda x: x[..., None, 1:],
        lambda x: x.chunk(2, 2)[1],
        lambda x: torch.chunk(x, 2, dim=1)[0],
        lambda x: x.split(3, 2)[2],
        lambda x: x.unbind(1)[3],
        lambda x: x.float().transpose(1, 2)[:, 1],
        lambda x: torch.permute(x, (0, 2, 3, 1)).reshape(1, -1, 4)[:, :5],
        lambda x: x.flatten(1).squeeze(0).clone().detach(),
    ],
)
def test_slices_and_views_of_a_deferred_tensor_are_deferred(
    view: Callable[[Tensor], Tensor], mode: Any, runs: list[Any]
) -> None:
    module, (one, two, timestep) = lockstep(), branches()
    with mode():
        part = view(module(one, timestep)["sample"])
        assert isinstance(part, DeferredTensor)
        expected = view(whole(block(), one, timestep))
        assert (part.shape, part.dtype, part.device) == (expected.shape, expected.dtype, expected.device)
        module(two, timestep)
        assert len(runs) == 1
        torch.testing.assert_close(part * 1, expected)


def test_what_is_asked_of_shape_and_dtype_computes_nothing(runs: list[Any]) -> None:
    module, (one, _, timestep) = lockstep(), branches()
    x = module(one, timestep)["sample"]
    assert isinstance(x, Tensor)
    assert (x.shape, x.size(1), x.ndim, x.dim(), len(x), x.numel()) == ((1, 4, 16, 8), 4, 4, 4, 1, 512)
    assert (x.dtype, x.device.type, x.is_floating_point(), x.requires_grad) == (torch.float32, "cpu", True, False)
    with pytest.raises(IndexError):
        x[3]
    assert not runs


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x.mean().item(),
        lambda x: x.numpy().mean(),
        lambda x: torch.cat([x, x]).tolist(),
        lambda x: x.data_ptr(),
        repr,
        lambda x: x.stride(),
        lambda x: torch.ops.aten.add(x, 1),
        lambda x: torch.ops.aten.add.Tensor(x, x),
        lambda x: x.to("meta"),
        lambda x: x.new_zeros(2),
        lambda x: x == 0,
        lambda x: x[x > 0],
        lambda x: torch.save(x, "/dev/null"),
    ],
)
def test_any_other_use_computes_the_value_first(use: Callable[[Tensor], Any], runs: list[Any]) -> None:
    module, (one, _, timestep) = lockstep(), branches()
    x = module(one, timestep)["sample"]
    use(x)
    assert len(runs) == 1
    torch.testing.assert_close(x + 0, whole(block(), one, timestep))
    assert len(runs) == 1


def test_a_result_that_is_used_before_the_second_call_is_right_and_later_calls_run_in_patches() -> None:
    module, (one, two, timestep) = lockstep(), branches()
    first = module(one, timestep)["sample"] + 0
    torch.testing.assert_close(first, whole(block(), one, timestep))
    with pytest.warns(FxpassWarning, match=r"2 calls that could run at once .* all 2 ranks work on patches"):
        second = module(two, timestep)["sample"]
    assert type(second) is Tensor
    assert module.plan.mesh == Mesh(1, 2)
    torch.testing.assert_close(second, whole(block(), two, timestep))
    torch.testing.assert_close(module(one, timestep)["sample"], whole(block(), one, timestep))


def test_inputs_that_change_between_the_calls_are_those_of_the_first_call() -> None:
    module, (one, two, timestep) = lockstep(), branches()
    expected = whole(block(), one, timestep)
    first = module(one, timestep)["sample"]
    one.zero_()
    timestep.add_(1)
    second = module(two, timestep)["sample"]
    torch.testing.assert_close(first + 0, expected)
    torch.testing.assert_close(second, whole(block(), two, timestep))


def test_a_result_that_is_changed_in_place_is_changed_in_its_slices_and_not_in_its_copies() -> None:
    module, (one, _, timestep) = lockstep(), branches()
    x = module(one, timestep)["sample"]
    expected = whole(block(), one, timestep)
    part, copy = x[:, 1:], x.clone()
    x[:, 1:] *= 2
    torch.testing.assert_close(x + 0, torch.cat([expected[:, :1], 2 * expected[:, 1:]], 1))
    torch.testing.assert_close(part + 0, 2 * expected[:, 1:])
    torch.testing.assert_close(copy + 0, expected)


def test_the_first_result_may_be_an_input_of_the_second_call() -> None:
    module, (one, _, timestep) = lockstep(), branches()
    first = module(one, timestep)["sample"]
    with pytest.warns(FxpassWarning, match="did not come one after the other"):
        second = module(first, timestep)["sample"]
    torch.testing.assert_close(second + 0, whole(block(), whole(block(), one, timestep), timestep))


def test_calls_of_different_shapes_do_not_run_together_and_are_right() -> None:
    module, (one, two, timestep) = lockstep(), branches()
    first = module(one, timestep)["sample"]
    second = module(two[:, :, :8], timestep)["sample"]
    torch.testing.assert_close(first + 0, whole(block(), one, timestep))
    torch.testing.assert_close(second + 0, whole(block(), two[:, :, :8], timestep))


def test_a_call_of_another_generation_does_not_run_together_with_one_that_waits() -> None:
    module, (one, two, timestep) = lockstep(), branches()
    first = module(one, timestep)["sample"]
    module.reset()
    second = module(two, timestep)["sample"]
    assert isinstance(second, DeferredTensor)
    third = module(one, timestep)["sample"]
    for x, result in ((one, first), (two, second), (one, third)):
        torch.testing.assert_close(result + 0, whole(block(), x, timestep))
    assert module.plan.mesh == Mesh(2, 1)


def test_the_next_generation_runs_calls_at_once_again_after_one_that_came_alone() -> None:
    module, (one, two, timestep) = lockstep(), branches()
    module.reset()
    torch.testing.assert_close(module(one, timestep)["sample"] + 0, whole(block(), one, timestep))
    with pytest.warns(FxpassWarning, match="until this generation ends"):
        second = module(two, timestep)["sample"]
    torch.testing.assert_close(second, whole(block(), two, timestep))
    assert module.plan.mesh == Mesh(1, 2)
    module.reset()
    first, second = module(one, timestep)["sample"], module(two, timestep)["sample"]
    assert module.plan.mesh == Mesh(2, 1)
    assert isinstance(first, DeferredTensor)
    assert type(second) is Tensor
    torch.testing.assert_close(first + 0, whole(block(), one, timestep))
    torch.testing.assert_close(second, whole(block(), two, timestep))


def test_the_calls_of_generations_that_take_turns_wait_for_those_of_their_own(runs: list[Any]) -> None:
    module = lockstep(strategy="displaced", warmup_steps=1)
    alone = lockstep(strategy="displaced", warmup_steps=1)
    seeds = (0, 1)
    expected = []
    for seed in seeds:
        with alone.generation():
            for sample, timestep in steps(4, seed=seed):
                pair = [alone(x, timestep)["sample"] for x in sample.split(1)]
                expected.append([x + 0 for x in pair])
    runs.clear()
    turns, found = [module.generation() for _ in seeds], {}
    for k in range(4):
        for branch in range(2):
            for seed in seeds:
                sample, timestep = steps(4, seed=seed)[k]
                with turns[seed]:
                    found.setdefault((seed, k), []).append(module(sample[branch : branch + 1], timestep)["sample"])
    assert len(runs) == 8
    for results, pair in zip([found[seed, k] for seed in seeds for k in range(4)], expected, strict=True):
        assert all(torch.equal(result + 0, x) for result, x in zip(results, pair, strict=True))


def test_no_more_than_a_few_generations_have_calls_that_wait(runs: list[Any]) -> None:
    module, (one, _, timestep) = lockstep(), branches()
    found = []
    for _ in range(GENERATIONS + 1):
        with module.generation():
            found.append(module(one, timestep)["sample"])
    assert len(runs) == 1
    for result in found:
        torch.testing.assert_close(result + 0, whole(block(), one, timestep))


def test_a_view_that_is_asked_for_while_the_result_comes_has_its_value() -> None:
    source = Source(lambda: None)
    (x,) = source.results([torch.ones(2, 3)])
    assert source.takes(Tensor.__getitem__, (x, 0), {})  # in one thread
    source.give([torch.arange(6.0).view(2, 3)])  # in another one
    assert source.later(Tensor.__getitem__, (x, 0), {}).tolist() == [0, 1, 2]
    (x,) = (source := Source(lambda: None)).results([torch.ones(2, 3)])
    source.fail(ValueError("out of luck"))
    with pytest.raises(RuntimeError, match="out of luck"):
        source.later(Tensor.__getitem__, (x, 0), {}).tolist()


def test_calls_that_wait_when_the_module_closes_and_fail_say_so_here_and_to_other_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, (one, _, timestep) = lockstep(), branches()
    waiting: list[Tensor] = []
    for _ in range(2):
        with module.generation():
            waiting.append(module(one, timestep)["sample"])
    told: list[BaseException] = []
    monkeypatch.setattr(LockstepPlan, "run", failing)
    monkeypatch.setattr(LockstepExecutor, "failed", lambda _, error: told.append(error))
    module.close()
    assert [type(error) for error in told] == [MemoryError]
    for each in waiting:
        with pytest.raises(RuntimeError, match="was not computed: memory is full"):
            _ = each + 0


def failing(*args: Any) -> Any:
    raise MemoryError("memory is full")


def test_what_waits_when_the_module_closes_is_computed() -> None:
    one, _, timestep = branches()
    with lockstep() as module:
        first = module(one, timestep)["sample"]
    torch.testing.assert_close(first + 0, whole(block(), one, timestep))


def test_what_waits_when_its_program_is_forgotten_is_computed() -> None:
    model = block()
    module, (one, two, timestep) = lockstep(model=model), branches()
    expected = whole(model, one, timestep)
    first = module(one, timestep)["sample"]
    model.scale = 3.0
    second = module(two, timestep)["sample"]
    torch.testing.assert_close(first + 0, expected)
    torch.testing.assert_close(second + 0, whole(model, two, timestep))


def test_a_result_whose_weights_have_changed_before_it_was_computed_is_an_error() -> None:
    model = block()
    module, (one, two, timestep) = lockstep(model=model), branches()
    first = module(one, timestep)["sample"]
    with torch.no_grad():
        model.conv_in.weight.mul_(2)
    second = module(two, timestep)["sample"]
    with pytest.raises(RuntimeError, match=r"not computed: the model's tensors were changed before it was used"):
        first.mean()
    torch.testing.assert_close(second + 0, whole(model, two, timestep))


class Scaled(Block):
    """Reads a tensor that is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__(16)
        self.by = [torch.ones(1)]

    def forward(self, sample: Tensor, timestep: Tensor) -> Any:
        return {"sample": super().forward(sample, timestep)["sample"] * self.by[0]}


@pytest.mark.parametrize("paired", [True, False])
def test_a_result_is_an_error_if_another_tensor_of_the_model_was_written_to_before_it_was_computed(
    paired: bool,
) -> None:
    model = Scaled().eval()
    module, (one, two, timestep) = lockstep(model=model), branches()
    first = module(one, timestep)["sample"]
    model.by[0].mul_(3)
    if paired:
        second = module(two, timestep)["sample"]
        torch.testing.assert_close(second + 0, whole(model, two, timestep))
    with pytest.raises(RuntimeError, match="the model's tensors were changed before it was used"):
        first.mean()


def test_the_shape_of_a_result_follows_changes_in_place() -> None:
    module, (one, two, timestep) = lockstep(), branches()
    first = module(one, timestep)["sample"]
    module(two, timestep)
    first.squeeze_(0)
    assert (first.shape, first.ndim, len(first)) == ((4, 16, 8), 3, 4)


@pytest.mark.parametrize("make", [list, torch.tensor])
def test_positions_that_change_after_a_slice_was_taken_are_those_of_the_slice(make: Callable[[Any], Any]) -> None:
    module, (one, two, timestep) = lockstep(), branches()
    positions = make([0])
    part = module(one, timestep)["sample"][:, positions]
    positions[0] = 3
    with pytest.warns(FxpassWarning, match="did not come one after the other"):
        module(two, timestep)
    torch.testing.assert_close(part + 0, whole(block(), one, timestep)[:, :1])


def test_calls_still_run_together_after_one_failed_that_was_alone(
    monkeypatch: pytest.MonkeyPatch, runs: list[Any]
) -> None:
    module, (one, two, timestep) = lockstep(), branches()
    first = module(one, timestep)["sample"]
    with monkeypatch.context() as patch:
        patch.setattr(LockstepPlan, "run", lambda *_: {}["nothing"])
        with pytest.raises(KeyError):
            first.mean()
    for _ in range(2):
        results = [module(x, timestep)["sample"] for x in (one, two)]
    assert len(runs) == 2
    torch.testing.assert_close(results[0] + 0, whole(block(), one, timestep))


def test_a_call_that_all_ranks_cannot_share_runs_alone_on_every_group() -> None:
    sample, timestep = inputs(rows=12)
    module = lockstep(24)  # groups of 12 ranks share 12 rows; 24 ranks cannot
    for _ in range(3):
        for x in sample.split(1):
            torch.testing.assert_close(module(x, timestep)["sample"] + 0, whole(block(), x, timestep))
    assert module.plan.mesh == Mesh(2, 12)


def test_what_waits_when_an_error_ends_the_block_is_given_up(runs: list[Any]) -> None:
    one, _, timestep = branches()
    module = lockstep()
    first = module(one, timestep)["sample"]
    with pytest.raises(KeyError), module:
        raise KeyError
    with pytest.raises(RuntimeError, match="left with KeyError"):
        first.mean()
    assert not runs


def test_when_the_calls_fail_both_results_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    module, (one, two, timestep) = lockstep(), branches()
    first = module(one, timestep)["sample"]

    def fail(*args: Any) -> Any:
        raise ValueError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(LockstepPlan, "run", fail)
        with pytest.raises(ValueError, match="out of luck"):
            module(two, timestep)
    with pytest.raises(RuntimeError, match=r"this result of an earlier call was not computed: out of luck"):
        first[:, 1:].mean()
    again = [module(x, timestep)["sample"] for x in (one, two)]
    torch.testing.assert_close(again[0] + 0, whole(block(), one, timestep))


class Parted(Block):
    """It returns a part of its result, too."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Any:
        result = super().forward(sample, timestep)["sample"]
        return result, result[:, :2]


def test_results_of_calls_that_run_at_once_share_memory_as_those_of_the_model_do() -> None:
    model = Parted().eval()
    module, (one, two, timestep) = lockstep(model=model), branches()
    for run in (model, module):
        with torch.no_grad():
            found = [run(x, timestep) for x in (one, two)]
        for result, part in found:
            before = part.clone()
            result.mul_(3)
            torch.testing.assert_close(part + 0, 3 * before)


class Counting(Block):
    """It writes to an argument."""

    def forward(self, sample: Tensor, timestep: Tensor, seen: Any = None) -> Any:
        result = super().forward(sample, timestep)
        if seen is not None:
            seen["mean"] = result["sample"].mean()
        return result


def test_a_call_that_writes_to_its_arguments_does_not_wait() -> None:
    model = Counting().eval()
    module, (one, _, timestep) = lockstep(model=model), branches()
    seen: dict[str, Tensor] = {}
    with pytest.warns(FxpassWarning, match="not divided among 2 groups"):
        out = module(one, timestep, seen)["sample"]
    assert type(out) is Tensor
    torch.testing.assert_close(seen["mean"], out.mean())


def test_warming_up_prepares_each_kind_of_step_of_calls_that_run_together() -> None:
    module, (one, two, timestep) = lockstep(4, strategy="displaced", warmup_steps=1), branches()
    module.warmup(one, timestep)
    assert module.plan.calls == 2
    found = [module(x, timestep)["sample"] for x in (one, two)]
    assert isinstance(found[0], DeferredTensor)
    torch.testing.assert_close(found[0] + 0, whole(block(), one, timestep))


def test_a_plan_for_calls_that_run_at_once_cannot_be_saved(tmp_path: Any) -> None:
    module, (one, two, timestep) = lockstep(), branches()
    for x in (one, two):
        module(x, timestep)
    with pytest.raises(ValueError, match="runs 2 calls at once, and cannot be saved"):
        module.plan.save(tmp_path / "plans.json")
