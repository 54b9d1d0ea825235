"""The drop-in module: looks like the model, follows its changes, never rewrites it."""

import copy
import inspect
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from enum import StrEnum
from typing import Any
from uuid import UUID

import pytest
import torch
from torch import Tensor, nn

import fxpass
from fxpass.capture import GuardError
from fxpass.ir.strategy import Strategy
from fxpass.models.small import case
from fxpass.runtime.calls.module import ParallelModule
from fxpass.runtime.calls.programs import GUARDED, SIGNATURES
from fxpass.runtime.lockstep import LockstepExecutor
from tests.runtime.plans import Block, block, inputs, parallel, steps, whole


@pytest.fixture
def model() -> Block:
    return block()


@pytest.fixture
def module(model: Block) -> ParallelModule:
    return parallel(model, LockstepExecutor(2))


def check(module: ParallelModule, model: nn.Module, seed: int = 0, rows: int = 16) -> None:
    torch.testing.assert_close(module(*inputs(rows, seed))["sample"], whole(model, *inputs(rows, seed)))


def test_a_parallel_module_has_the_attributes_of_the_model(module: ParallelModule, model: Block) -> None:
    assert inspect.signature(module.forward) == inspect.signature(model.forward)
    assert module.config is model.config
    assert module.dtype is torch.float32
    assert module.conv_in is model.conv_in
    assert isinstance(module, Block)
    assert isinstance(module, ParallelModule)
    assert list(module.state_dict()) == list(model.state_dict())
    assert [n for n, _ in module.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert [n for n, _ in module.named_modules()] == [n for n, _ in model.named_modules()]
    assert [n for n, _ in nn.Sequential(module).named_parameters()] == [f"0.{n}" for n, _ in model.named_parameters()]


def test_setting_an_attribute_sets_it_on_the_model(module: ParallelModule, model: Block) -> None:
    module.scale = 3.0
    assert model.scale == 3.0
    module.extra = nn.Linear(2, 2)
    assert model.extra is module.extra
    del module.extra
    assert not hasattr(model, "extra")


def test_moving_and_loading_act_on_the_model(module: ParallelModule, model: Block) -> None:
    assert module.to(torch.float64) is module
    assert model.conv_in.weight.dtype == torch.float64
    module.load_state_dict(block(seed=3).state_dict())
    assert torch.equal(model.conv_in.weight, block(seed=3).conv_in.weight.double())
    assert module.float().eval() is module
    check(module, model)


def test_the_model_is_not_patched(module: ParallelModule, model: Block) -> None:
    before = {name: dict(vars(m)) for name, m in model.named_modules()}
    module(*inputs())
    after = {name: dict(vars(m)) for name, m in model.named_modules()}
    assert {n: list(d) for n, d in before.items()} == {n: list(d) for n, d in after.items()}
    assert all(after[n][k] is v for n, d in before.items() for k, v in d.items())


def test_outputs_keep_their_structure(module: ParallelModule) -> None:
    sample, timestep = inputs()
    as_tuple = module(sample=sample, timestep=timestep, return_dict=False)
    assert type(as_tuple) is tuple
    assert torch.equal(as_tuple[0], module(sample, timestep)["sample"])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_calls_work_in_every_grad_mode(module: ParallelModule, model: Block, mode: Any) -> None:
    with mode():
        result = module(*inputs())["sample"]
    assert not result.requires_grad
    torch.testing.assert_close(result.clone(), whole(model, *inputs()))
    check(module, model, seed=1)


def test_an_input_that_requires_a_gradient_is_refused_where_gradients_are_enabled(module: ParallelModule) -> None:
    sample, timestep = inputs()
    sample.requires_grad_()
    with pytest.raises(RuntimeError, match=r"the input 'sample' requires a gradient.*no_grad"):
        module(sample, timestep)
    with torch.no_grad():
        expected = module(sample, timestep)["sample"]
    assert torch.equal(module(sample.detach(), timestep)["sample"], expected)


class Addends(nn.Module):
    def forward(self, x: Tensor, /, y: Tensor, *more: Tensor, scale: Tensor, **others: Tensor) -> Tensor:
        return (x + y + sum(more)) * scale + sum(others.values())


@pytest.mark.parametrize("positional", [1, 2, 3, 4])
def test_hooks_see_arguments_as_the_caller_passed_them(positional: int) -> None:
    seen = []
    model = Addends().eval()
    model.register_forward_pre_hook(lambda m, args, kw: seen.append((len(args), list(kw))), with_kwargs=True)
    args = [torch.randn(1, 4, 8) for _ in range(positional)]
    kwargs = {} if positional > 1 else {"y": torch.randn(1, 4, 8)}
    kwargs |= {"scale": torch.randn(8), "other": torch.randn(8)}
    expected = model(*args, **kwargs)
    module = fxpass.parallelize(model, 2, executor="lockstep")
    assert torch.equal(module(*args, **kwargs), expected)
    assert len(seen) > 1
    assert all(each == (positional, list(kwargs)) for each in seen)


def test_a_hook_may_need_an_argument_to_be_positional(module: ParallelModule, model: Block) -> None:
    handle = model.register_forward_pre_hook(lambda m, args: (args[0] * 2, *args[1:]))
    check(module, model)
    handle.remove()
    sample, timestep = inputs()
    by_name = module(sample=sample, timestep=timestep)["sample"]
    torch.testing.assert_close(by_name, whole(model, sample, timestep))


class Prompt:
    """An object that a caller makes anew for each prompt."""

    def __init__(self, name: str) -> None:
        self.name = name


class Prompted(nn.Module):
    def forward(self, x: Tensor, options: dict[str, Any], mode: str = "") -> Any:
        if self.reads == "text" and options["id"]:
            x = x * 2
        if self.reads == "equality":
            x = x * (1 + (options["id"] == self.wanted))
        if self.reads == "attribute" and isinstance(options["id"], Prompt):
            x = x * len(options["id"].name)
        if self.reads == "guarded" and options["t"] > 0.5:
            x = x * len(str(options["id"]))
        x = nn.functional.relu(x) * (2 if mode == "double" else 1)
        return (x, options["id"]) if self.reads == "returned" else x

    reads, wanted = "", ""


@pytest.mark.parametrize(
    "make",
    [
        str,
        Prompt,
        lambda name: UUID(name.rjust(32, "0")),
        lambda name: UUID(name.ljust(32, "0")).int,
        lambda name: [Prompt(name)] * 2,
    ],
    ids=["text", "object", "identifier", "large number", "list"],
)
def test_an_argument_that_is_never_read_asks_for_no_new_program(make: Any) -> None:
    """Two captures show that it is not read; after these there are none."""
    model = Prompted().eval()
    module: Any = fxpass.parallelize(model, 2, executor="lockstep")
    plans = []
    for name in "1234561":
        x = torch.randn(1, 4, 8)
        assert torch.equal(module(x, {"id": make(name)}, mode="double"), model(x, {"id": make(name)}, mode="double"))
        plans.append(id(module.plan))
    assert len(set(plans)) == 2
    assert len(set(plans[1:-1])) == 1
    assert torch.equal(module(x, {"id": make("7")}), model(x, {"id": make("7")}))


@pytest.mark.parametrize("reads", ["text", "equality", "attribute", "guarded", "returned"])
@pytest.mark.parametrize("make", [str, Prompt])
def test_an_argument_that_is_read_is_part_of_the_key_however_it_is_read(reads: str, make: Any) -> None:
    model = Prompted().eval()
    model.reads, model.wanted = reads, "22"
    module: Any = fxpass.parallelize(model, 2, executor="lockstep")
    for i, name in enumerate(["1", "333", "22", "4444", "22", "1"]):
        prompt = make(name)
        x, options = torch.randn(1, 4, 8), {"id": prompt, "t": torch.tensor(i / 4)}
        if reads == "guarded" and make is Prompt:
            options["id"] = name  # the text of an object names its address
        found, expected = module(x, options), model(x, options)
        if reads == "returned":
            assert torch.equal(found[0], expected[0])
            assert found[1] is expected[1] or vars(found[1]) == vars(expected[1])
        else:
            assert torch.equal(found, expected)


class Mode(StrEnum):
    HALF, WHOLE, DOUBLE = "half", "whole", "double"


def test_a_member_of_an_enum_is_part_of_the_key_although_it_is_compared_by_identity() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, mode: Mode) -> Tensor:
            return nn.functional.relu(x) * (2 if mode is Mode.DOUBLE else 1)

    model = Model().eval()
    module: Any = fxpass.parallelize(model, 2, executor="lockstep")
    for mode in (Mode.HALF, Mode.WHOLE, Mode.DOUBLE, Mode.HALF):
        x = torch.randn(1, 4, 8)
        assert torch.equal(module(x, mode), model(x, mode))


def test_changed_and_replaced_weights_are_seen_without_a_new_capture(module: ParallelModule, model: Block) -> None:
    check(module, model)
    plan = module.plan
    with torch.no_grad():
        model.conv_in.weight.mul_(2)
    check(module, model)
    model.conv_in.weight.data = torch.randn_like(model.conv_in.weight)
    check(module, model)
    model.norm.weight = nn.Parameter(torch.randn(16))
    check(module, model)
    model.conv_out = copy.deepcopy(model.conv_out)
    nn.init.normal_(model.conv_out.weight)
    check(module, model)
    assert module.plan is plan


def test_a_changed_structure_is_captured_anew(module: ParallelModule, model: Block) -> None:
    check(module, model)
    plan = module.plan
    model.scale = 0.5
    check(module, model)
    assert module.plan is not plan
    plan = module.plan
    model.key = nn.Sequential(model.key, nn.Linear(16, 16))  # as an adapter does
    check(module, model)
    assert module.plan is not plan
    assert len(module._engine.programs) == 1


def test_a_changed_class_attribute_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(nn.Module):
        scales: dict[str, float] = {"x": 1.0}  # noqa: RUF012

        def factor(self) -> float:
            return 2.0

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.relu(x) * self.scales["x"] * self.factor()

    x = torch.randn(1, 4, 8)
    module: Any = fxpass.parallelize(Model().eval(), 2, executor="lockstep")
    assert torch.equal(module(x), module.unwrapped(x))
    plan = module.plan
    assert torch.equal(module(x + 1), module.unwrapped(x + 1))
    assert Model.__annotations__
    assert module.plan is plan
    Model.scales["x"] = 3.0
    assert torch.equal(module(x), module.unwrapped(x))
    monkeypatch.setattr(Model, "factor", lambda self: 5.0)
    assert torch.equal(module(x), module.unwrapped(x))


def test_weights_that_are_tied_or_untied_are_captured_anew(module: ParallelModule, model: Block) -> None:
    model.query.weight = model.key.weight
    check(module, model)
    model.query.weight = nn.Parameter(torch.randn_like(model.key.weight))
    check(module, model)
    model.query.weight = model.key.weight
    check(module, model)


def test_a_number_inside_an_adapters_dict_is_part_of_the_structure(model: Block) -> None:
    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.scaling = nn.Linear(16, 16), {"default": 1.0}

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) * self.scaling["default"]

    adapter = model.query = Adapter()
    module = parallel(model, LockstepExecutor(2))
    check(module, model)
    adapter.scaling["default"] = 3.0
    check(module, model)


def test_programs_are_kept_per_signature_and_bounded(module: ParallelModule, model: Block) -> None:
    check(module, model)
    plan = module.plan
    check(module, model, rows=18)
    assert module.plan is not plan
    check(module, model)
    assert module.plan is plan
    for rows in range(20, 20 + 2 * SIGNATURES, 2):
        module(*inputs(rows))
    assert len(module._engine.programs) == SIGNATURES
    with pytest.warns(UserWarning, match="captured again"):
        check(module, model)
    assert module.plan is not plan


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, sample: Tensor, times: Tensor) -> Tensor:
        for _ in range(int(times)):
            sample = self.conv(sample)
        return sample


def test_an_input_that_became_a_number_is_guarded() -> None:
    model = Counts().eval()
    module = parallel(model, LockstepExecutor(2))
    sample = inputs()[0]
    with torch.no_grad():
        for times in (1, 3, 1):
            torch.testing.assert_close(module(sample, torch.tensor(times)), model(sample, torch.tensor(times)))
    assert len(module._engine.programs) == 2
    for times in (2, 4, 5):
        torch.testing.assert_close(module(sample, torch.tensor(times)), model(sample, torch.tensor(times)))
    assert len(module._engine.programs) == GUARDED  # as with prompts of ever other lengths, used for many steps each
    module(sample, torch.tensor(1))
    module(sample, torch.tensor(5))
    for times in (6, 7, 8, 9):
        module(sample, torch.tensor(times))
    with pytest.raises(GuardError, match="test_module"):  # another value at every call
        module(sample, torch.tensor(10))


def test_of_the_programs_of_one_kind_of_call_the_least_recently_used_is_evicted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Counts().eval()
    module = parallel(model, LockstepExecutor(2))
    calls = [(inputs()[0], 1), (inputs()[0], 3), *((inputs(18 + 2 * k)[0], 1) for k in range(SIGNATURES - 1))]
    for sample, times in calls:
        module(sample, torch.tensor(times))
    assert len(module._engine.programs) == SIGNATURES
    monkeypatch.setattr("fxpass.runtime.calls.programs.capture_call", lambda *_: 1 / 0)
    for sample, times in calls[1:]:
        torch.testing.assert_close(module(sample, torch.tensor(times)), model(sample, torch.tensor(times)))
    with pytest.raises(ZeroDivisionError):
        module(inputs()[0], torch.tensor(1))


@pytest.mark.filterwarnings("error:torch.compile leaves")  # a capture in another thread is no use of torch.compile
def test_calls_from_several_threads_run_one_after_the_other(model: Block) -> None:
    module = parallel(model, LockstepExecutor(2), replace(Strategy.of("stale_gn"), warmup_steps=1))
    given = [inputs(seed=seed) for seed in range(8)]  # each from another noise: all steps are exact
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda call: module(*call)["sample"], given))
    for call, output in zip(given, found, strict=True):
        torch.testing.assert_close(output, whole(model, *call))


@pytest.mark.parametrize("named", [True, False])
def test_two_calls_per_step_are_two_contexts_whether_the_pipeline_names_them_or_not(named: bool) -> None:
    """As pipelines do that do not batch guidance; each branch is what it is by itself, bit for bit."""
    model: Any = case("wan").build()
    first, second = (case("wan").inputs(seed=seed, module=model) for seed in (1, 2))
    second["hidden_states"] = first["hidden_states"]
    drift = torch.randn(first["hidden_states"].shape, generator=torch.Generator().manual_seed(3))

    def at(branch: dict[str, Any], k: int) -> dict[str, Any]:
        sample = branch["hidden_states"] + 0.1 * k * drift
        return branch | {"hidden_states": sample, "timestep": torch.tensor([900 - 100 * k])}

    def split() -> Any:
        return fxpass.parallelize(model, 2, strategy="stale_gn", warmup_steps=1, executor="lockstep")

    with torch.no_grad():
        both, found = split(), []
        for k in range(4):
            for name, branch in (("cond", first), ("uncond", second)):
                with both.cache_context(name) if named else nullcontext():
                    found.append(both(**at(branch, k)).sample)
        for i, branch in enumerate((first, second)):
            alone = split()
            for k in range(4):
                expected = alone(**at(branch, k)).sample
                assert torch.equal(found[2 * k + i], expected)
                assert torch.allclose(expected, model(**at(branch, k)).sample, atol=1e-5) == (k == 0)


def test_training_mode_is_refused_where_gradients_are_enabled(module: ParallelModule) -> None:
    module.train()
    with pytest.raises(RuntimeError, match=r"model\.eval\(\)"):
        module(*inputs())


@torch.no_grad()
def test_a_model_that_pipelines_leave_in_training_mode_is_split_and_captured_again_in_eval_mode() -> None:
    class Modal(Block):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            found = super().forward(*args, **kwargs)
            return {name: value + self.training for name, value in found.items()}

    model: nn.Module = Modal()
    split = parallel(model, LockstepExecutor(2))
    for mode in (True, False, True):
        model.train(mode)
        torch.testing.assert_close(split(*inputs())["sample"], model(*inputs())["sample"])


def test_a_closed_module_says_so(module: ParallelModule) -> None:
    with module:
        module(*inputs())
    with pytest.raises(RuntimeError, match="closed"):
        module(*inputs())


def test_wrong_arguments_fail_as_the_model_would(module: ParallelModule, model: Block) -> None:
    with pytest.raises(TypeError, match="missing a required argument: 'timestep'"):
        module(inputs()[0])
    check(module, model)


def test_a_parallel_module_cannot_be_pickled_or_copied(module: ParallelModule) -> None:
    with pytest.raises(TypeError, match="unwrapped"):
        copy.deepcopy(module)


def test_generations_that_take_turns_never_read_each_others_state() -> None:
    """Two pictures from one start image and one prompt: nothing else tells their calls apart."""
    strategy = replace(Strategy.of("displaced"), warmup_steps=1)
    together = parallel(block(), LockstepExecutor(2), strategy)
    calls = [steps(5, seed=3), [(sample + 0.05, time) for sample, time in steps(5, seed=3)]]
    generations = [together.generation(), together.generation()]
    found: list[list[Tensor]] = [[], []]
    for k in range(5):
        for i, generation in enumerate(generations):
            with generation:
                found[i].append(together(*calls[i][k])["sample"])
    for i, each in enumerate(found):
        alone = parallel(block(), LockstepExecutor(2), strategy)
        with alone.generation():
            expected = [alone(*call)["sample"] for call in calls[i]]
        assert all(torch.equal(a, b) for a, b in zip(each, expected, strict=True))
        assert not torch.equal(each[-1], whole(block(), *calls[i][-1]))  # it is displaced


def test_loops_in_two_threads_never_read_each_others_state() -> None:
    strategy = replace(Strategy.of("displaced"), warmup_steps=1)
    together = parallel(block(), LockstepExecutor(2), strategy)
    calls = [steps(5, seed=3), [(sample + 0.05, time) for sample, time in steps(5, seed=3)]]
    turns = [threading.Event() for _ in range(11)]
    turns[0].set()

    def loop(i: int) -> list[Tensor]:
        found = []
        for k, call in enumerate(calls[i]):
            assert turns[2 * k + i].wait(60)
            found.append(together(*call)["sample"])
            turns[2 * k + i + 1].set()
        return found

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(loop, range(2)))
    for i, found in enumerate(results):
        alone = parallel(block(), LockstepExecutor(2), strategy)
        assert all(torch.equal(a, alone(*call)["sample"]) for a, call in zip(found, calls[i], strict=True))


def test_a_generation_in_which_no_step_can_be_displaced_warns_once_at_its_end() -> None:
    module = parallel(block(), LockstepExecutor(2), replace(Strategy.of("displaced"), warmup_steps=4))
    calls = steps(3, seed=3)
    with module.generation([float(time) for _, time in calls]):
        for call in calls[:2]:
            module(*call)
        with pytest.warns(fxpass.FxpassWarning, match=r"no step of this generation was displaced.*warmup_steps is 4"):
            module(*calls[2])
    with module.generation([float(time) for _, time in calls]):
        for call in calls:
            module(*call)
