"""One model in many variants: dtypes, orders in memory, adapters, processors, quantised weights. All must stay exact.

Low precision is judged by the float32 model: the split model may be off by twice as much as the unsplit one of the same
dtype, by root mean square.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models import attention_processor
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxpass
from fxpass.capture import CaptureError
from fxpass.capture.objects import flatten
from fxpass.models.small import case, cases
from tests.outside.cases import outsiders
from tests.outside.quantised import FORMS, QuantisedTensor, quantise, quantised
from tests.test_exact import EXACT, error

ROWS = 32
OUTSIDERS = {each.name: each for each in outsiders}
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
SLOW = pytest.mark.slow


def build(name: str) -> Any:
    return OUTSIDERS[name].build(ROWS) if name in OUTSIDERS else case(name).build()


def arguments(name: str, module: nn.Module, seed: int, batch: int = 2) -> Arguments:
    if name in OUTSIDERS:
        return OUTSIDERS[name].arguments(ROWS, batch, seed)
    return (), case(name).inputs(rows=ROWS, batch=batch, seed=seed, module=module)


def tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in flatten(output)[0] if isinstance(leaf, Tensor)]


def assert_exact(parallel: Any, name: str, batch: int = 2, arrange: Callable[[Any], Any] = lambda given: given) -> None:
    """On inputs of two seeds, so that the second is not what the program was captured with."""
    for seed in (1, 2):
        args, kwargs = arrange(arguments(name, parallel.unwrapped, seed, batch))
        found, expected = tensors(parallel(*args, **kwargs)), tensors(parallel.unwrapped(*args, **kwargs))
        for a, b in zip(found, expected, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert error(a, b) <= EXACT
    assert not parallel.plan.fallbacks, str(parallel.plan)


def changed(module: Any, kind: type[nn.Module], change: Callable[[Any], Any]) -> Any:
    """Every layer of that kind is replaced by what `change` makes of it."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kind):
                setattr(parent, name, change(child))
    return module.eval()


# -- dtypes ----------------------------------------------------------------------------------------------------------


def cast(value: Any, dtype: torch.dtype) -> Any:
    flatten(value)  # lets pytrees enter dataclasses
    return pytree.tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, value)


def rms(found: Tensor, reference: Tensor) -> float:
    return (found.double() - reference.double()).square().mean().sqrt().item()


def _all(module: Any, dtype: torch.dtype) -> Any:
    return module.to(dtype)


def _only_convolutions(module: Any, dtype: torch.dtype) -> Any:
    """Norms, embeddings and the time stay in float32: islands, with casts between."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
            layer.to(dtype)
    first = module.input_blocks[0][0]
    first.register_forward_pre_hook(lambda _, given: (given[0].to(dtype),))
    module.out[2].register_forward_pre_hook(lambda _, given: (given[0].to(dtype),))
    return module


LOW = [("unet_sd", _all), ("flux", _all), ("hourglass_mask", _all), ("linear_attention", _all)]
LOW += [("adm", _only_convolutions), ("uvit", None)]
LOW += [(each.name, _all) for each in cases if each.name not in ("unet_sd", "flux")]


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=SLOW)], ids=["bfloat16", "float16"]
)
@pytest.mark.parametrize(
    ("name", "lower"), [pytest.param(*one, id=one[0], marks=[SLOW] if i > 5 else []) for i, one in enumerate(LOW)]
)
@torch.no_grad()
def test_a_split_model_of_low_precision_is_as_near_to_float32_as_the_unsplit_one(
    name: str, lower: Any, dtype: torch.dtype
) -> None:
    module = build(name)
    low = copy.deepcopy(module) if lower is None else lower(copy.deepcopy(module), dtype)
    parallel: Any = fxpass.parallelize(low, 3, executor="lockstep")
    for seed in (1, 2):
        args, kwargs = arguments(name, module, seed)
        reference = tensors(module(*args, **kwargs))
        if lower is _all:
            args, kwargs = cast((args, kwargs), dtype)
        with torch.autocast("cpu", dtype, enabled=lower is None):
            found, expected = tensors(parallel(*args, **kwargs)), tensors(low(*args, **kwargs))
        for a, b, exact in zip(found, expected, reference, strict=True):
            assert a.dtype == b.dtype
            assert rms(b, exact) > 1e-5, "not of low precision at all"
            assert rms(a, exact) <= 2 * rms(b, exact)
    assert not parallel.plan.fallbacks, str(parallel.plan)


# -- memory, batch, gradients ----------------------------------------------------------------------------------------


def _channels_last(value: Any) -> Any:
    form = {4: torch.channels_last, 5: torch.channels_last_3d}
    return pytree.tree_map_only(
        Tensor, lambda x: x.to(memory_format=form[x.ndim]) if x.ndim in form else x, value
    )  # fmt: skip


@pytest.mark.parametrize("name", ["adm", "medical", "vae_decode", "linear_attention"])
@torch.no_grad()
def test_channels_may_lie_last_in_model_and_inputs(name: str) -> None:
    module = build(name)
    for parameter in module.parameters():
        parameter.data = _channels_last(parameter.data)
    assert_exact(fxpass.parallelize(module, 2, executor="lockstep"), name, arrange=_channels_last)


@pytest.mark.parametrize("name", ["uvit", "flux"])
@torch.no_grad()
def test_the_batch_may_change_from_call_to_call(name: str) -> None:
    parallel = fxpass.parallelize(build(name), 2, executor="lockstep")
    for batch in (1, 3, 2):
        assert_exact(parallel, name, batch)


MODES = (torch.inference_mode, torch.no_grad, torch.enable_grad)


@pytest.mark.parametrize("executor", ["lockstep", "spawn"])
@pytest.mark.parametrize("strategy", ["sync", "displaced"])
def test_calls_with_and_without_gradients_and_in_inference_mode_take_turns(executor: str, strategy: str) -> None:
    module = build("uvit").requires_grad_(True)
    options: dict[str, Any] = {"strategy": strategy, "executor": executor, "timeout": 120}
    with fxpass.parallelize(module, 2, **options) as parallel:
        for mode in (*MODES, *MODES[::-1]):
            with mode():
                args, kwargs = arguments("uvit", module, 1)  # inference tensors among them
                found, expected = parallel(*args, **kwargs), module(*args, **kwargs)
            assert not found.requires_grad
            assert error(found, expected) <= EXACT


def test_a_model_made_in_inference_mode_is_split() -> None:
    with torch.inference_mode():
        parallel = fxpass.parallelize(build("uvit"), 2, executor="lockstep")
        assert_exact(parallel, "uvit")
    with torch.no_grad():
        assert_exact(parallel, "uvit")


@pytest.mark.parametrize("name", ["unet_sd", "flux"])
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    module = build(name).requires_grad_(True)
    module.enable_gradient_checkpointing()
    assert_exact(fxpass.parallelize(module, 2, executor="lockstep"), name)


# -- attention -------------------------------------------------------------------------------------------------------


def _backend(name: str) -> Callable[[Any], None]:
    return lambda module: module.set_attention_backend(name)


def _processor(kind: Any) -> Callable[[Any], None]:
    return lambda module: module.set_attn_processor(kind())


ATTENTION: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "fused in a UNet": ("unet_sd", lambda module: module.fuse_qkv_projections()),
    "fused in an MMDiT": ("sd3", lambda module: module.fuse_qkv_projections()),
    "fused in Flux": ("flux", lambda module: module.fuse_qkv_projections()),
    "by products": ("unet_sd", _processor(attention_processor.AttnProcessor)),
    "by one operator": ("unet_sd", _processor(attention_processor.AttnProcessor2_0)),
    "sliced": ("unet_sd", lambda module: module.set_attention_slice("max")),
    "sliced in halves": ("unet_sd", lambda module: module.set_attention_slice("auto")),
    "backend native": ("flux", _backend("native")),
    "backend math": ("wan", _backend("_native_math")),
}


@pytest.fixture
def backends() -> Any:
    """A backend set on one model is the choice of all models that are made later."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry._active_backend = before


@pytest.mark.usefixtures("backends")
@pytest.mark.parametrize("when", ["before", pytest.param("after", marks=SLOW)])
@pytest.mark.parametrize(("name", "change"), ATTENTION.values(), ids=ATTENTION)
@torch.no_grad()
def test_attention_may_be_set_before_the_model_is_split_or_after(
    name: str, change: Callable[[Any], Any], when: str
) -> None:
    module = build(name)
    if when == "before":
        change(module)
    parallel = fxpass.parallelize(module, 2, executor="lockstep")
    if when == "after":
        parallel(**arguments(name, module, 3)[1])
        change(parallel)
    assert_exact(parallel, name)


# -- adapters --------------------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A layer with low-rank adapters beside it, laid out as PEFT does."""

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int = 3) -> None:
        super().__init__()
        self.base_layer = base
        down: nn.Module
        if isinstance(base, nn.Linear):
            down, up = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)
        else:
            size: Any = base.kernel_size
            stride: Any = base.stride
            padding: Any = base.padding
            down = nn.Conv2d(base.in_channels, rank, size, stride, padding, bias=False)
            up = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        self.lora_A, self.lora_B = nn.ModuleDict({"style": down}), nn.ModuleDict({"style": up})
        self.lora_dropout = nn.ModuleDict({"style": nn.Dropout(0.1)})
        self.scaling, self.active_adapters, self.disable_adapters = {"style": 0.7}, ["style"], False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        if not self.disable_adapters:
            for name in self.active_adapters:
                y = self.lora_A[name](self.lora_dropout[name](x.to(next(self.lora_A[name].parameters()).dtype)))
                result = result + self.lora_B[name](y) * self.scaling[name]
        return result


def _adapted(module: Any) -> Any:
    return changed(changed(module, nn.Linear, Adapted), nn.Conv2d, Adapted)


def _adapters(module: Any) -> list[Adapted]:
    return [layer for layer in module.modules() if isinstance(layer, Adapted)]


@pytest.mark.parametrize("name", ["uvit", *(pytest.param(name, marks=SLOW) for name in ("adm", "unet_sd", "flux"))])
@torch.no_grad()
def test_adapters_may_be_loaded_scaled_and_switched_off(name: str) -> None:
    module = build(name)
    parallel: Any = fxpass.parallelize(module, 2, executor="lockstep")
    args, kwargs = arguments(name, module, 3)
    results = [tensors(parallel(*args, **kwargs))[0]]
    _adapted(module)
    results.append(tensors(parallel(*args, **kwargs))[0])
    assert_exact(parallel, name)
    for layer in _adapters(module):
        layer.scaling["style"] = 0.1
    results.append(tensors(parallel(*args, **kwargs))[0])
    assert_exact(parallel, name)
    for layer in _adapters(module):
        layer.disable_adapters = True
    results.append(tensors(parallel(*args, **kwargs))[0])
    assert error(results[3], results[0]) <= EXACT
    assert min(error(a, b) for a, b in ((results[0], results[1]), (results[1], results[2]))) > EXACT


# -- quantised weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["uvit", "rearranged", pytest.param("flux", marks=SLOW)])
@torch.no_grad()
def test_quantised_weights_are_split_like_any(name: str, form: str) -> None:
    parallel: Any = fxpass.parallelize(quantise(build(name), form), 2, executor="lockstep")
    assert_exact(parallel, name)
    assert any(weight.endswith("codes") for weight in parallel.plan.program.weights.values())


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "IntxWeightOnlyConfig", "Float8WeightOnlyConfig"])
@pytest.mark.parametrize("name", ["flux", pytest.param("unet_sd", marks=SLOW)])
@torch.no_grad()
def test_weights_that_torchao_has_quantised_are_split_like_any(name: str, config: str) -> None:
    torchao: Any = pytest.importorskip("torchao.quantization")
    module = build(name)
    torchao.quantize_(module, getattr(torchao, config)())
    parallel: Any = fxpass.parallelize(module, 2, executor="lockstep")
    assert_exact(parallel, name)
    assert any(weight.endswith("weight.qdata") for weight in parallel.plan.program.weights.values())


@pytest.mark.parametrize("name", ["flux", pytest.param("unet_sd", marks=pytest.mark.slow)])
@torch.no_grad()
def test_activations_that_torchao_quantises_are_as_near_to_float32_as_unsplit(name: str) -> None:
    """Where a number lies between two codes, its last bit decides: the unsplit model moves as far by such a change."""
    torchao: Any = pytest.importorskip("torchao.quantization")
    module = build(name)
    low = copy.deepcopy(module)
    torchao.quantize_(low, torchao.Int8DynamicActivationInt8WeightConfig())
    parallel: Any = fxpass.parallelize(low, 2, executor="lockstep")
    for seed in (1, 2):
        args, kwargs = arguments(name, module, seed)
        found, unsplit, exact = (tensors(each(*args, **kwargs))[0] for each in (parallel, low, module))
        assert rms(unsplit, exact) > 1e-5
        assert rms(found, exact) <= 2 * rms(unsplit, exact)
        assert rms(found, unsplit) <= rms(unsplit, exact)
    assert not parallel.plan.fallbacks


@pytest.mark.parametrize("executor", ["lockstep", "spawn"])
@torch.no_grad()
def test_a_quantised_weight_that_is_replaced_or_changed_is_seen(executor: str) -> None:
    module: Any = quantise(build("uvit"), "subclass")
    layer: Any = module.get_submodule("mid_block.mlp.0")
    with fxpass.parallelize(module, 2, executor=executor, timeout=120) as parallel:
        assert_exact(parallel, "uvit")
        layer.weight = nn.Parameter(QuantisedTensor(*quantised(torch.randn(layer.weight.shape))), requires_grad=False)
        assert_exact(parallel, "uvit")
        layer.weight.scale.mul_(3)
        assert_exact(parallel, "uvit")


def test_a_weight_packed_into_an_object_is_refused_with_the_line() -> None:
    module = torch.ao.quantization.quantize_dynamic(build("uvit"), {nn.Linear}, dtype=torch.qint8)
    args, kwargs = arguments("uvit", module, 1)
    with pytest.raises(CaptureError, match=r"linear_dynamic.*uvit\.py:\d+ .*only this process can read"):
        fxpass.parallelize(module, 2, executor="lockstep")(*args, **kwargs)


@torch.no_grad()
def test_a_model_that_branches_on_the_memory_order_gets_another_program() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) * (2 if x.is_contiguous() else 3)

    model = Model().eval()
    parallel = fxpass.parallelize(model, 2, executor="lockstep")
    for x in (torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8).mT, torch.randn(1, 3, 8, 8)):
        assert error(parallel(x), model(x)) <= EXACT
