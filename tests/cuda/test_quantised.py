"""Weights as diffusers loads them quantised, and models that are offloaded: split or refused, never wrong."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import BitsAndBytesConfig, FluxTransformer2DModel
from torch import nn

import fxpass
from fxpass.models.pipelines_zoo.uses import start
from fxpass.models.small import case, output_tensors
from tests.cuda.ranks import on
from tests.test_exact import error

ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
DEVICE = "cuda:0"
#: quantised products round inputs in blocks of rows, which a rank has fewer of
ROUNDED = {"load_in_8bit": 2e-2, "load_in_4bit": 1e-3}


def worst(model: Any, device: str, world: int = 2) -> float:
    """The largest difference between a model and its split form."""
    given = on(device, case("flux").inputs(rows=32, batch=2, seed=1, module=model))
    with torch.no_grad(), fxpass.parallelize(model, world, executor="lockstep") as split:
        found, expected = output_tensors(split(**given)), output_tensors(model(**given))
        assert not split.plan.fallbacks
    return max(error(a, b) for a, b in zip(found, expected, strict=True))


@ON_A_GPU
@pytest.mark.usefixtures("plain_products")
@pytest.mark.parametrize("kind", ROUNDED)
def test_a_model_that_bitsandbytes_has_quantised_is_split(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    made: Any = case("flux").build()
    made.save_pretrained(tmp_path)
    options: dict[str, Any] = {kind: True, "bnb_4bit_compute_dtype": torch.float32}
    config = BitsAndBytesConfig(**options)
    model = FluxTransformer2DModel.from_pretrained(tmp_path, quantization_config=config, torch_dtype=torch.float16)
    assert worst(model, DEVICE) <= ROUNDED[kind]


def gguf_linears(model: nn.Module, kind: str) -> int:
    """Give a model linear layers of GGUF, as `from_single_file` does by a `GGUFQuantizationConfig`; how many."""
    gguf: Any = pytest.importorskip("gguf")
    utils: Any = importlib.import_module("diffusers.quantizers.gguf.utils")
    quantised, count = gguf.GGMLQuantizationType[kind], 0
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and layer.in_features % gguf.GGML_QUANT_SIZES[quantised][0] == 0:
                bias = layer.bias is not None
                new = utils.GGUFLinear(layer.in_features, layer.out_features, bias, compute_dtype=torch.float32)
                data = gguf.quants.quantize(layer.weight.detach().numpy(), quantised)
                new.weight = utils.GGUFParameter(torch.from_numpy(data), quant_type=quantised)
                if bias:
                    new.bias = layer.bias
                setattr(parent, name, new)
                count += 1
    return count


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("device", ["cpu", pytest.param(DEVICE, marks=ON_A_GPU)])
def test_a_model_with_weights_of_gguf_is_split(device: str, kind: str) -> None:
    model: Any = case("flux").build()
    assert gguf_linears(model, kind) > 3
    assert worst(model.to(device), device) <= 1e-5


@ON_A_GPU
@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_pipeline_that_is_offloaded_is_refused_with_what_to_do(offload: str, when: str) -> None:
    small = start()
    pipe: Any = small.pipeline
    if when == "before":
        getattr(pipe, offload)()
    else:
        pipe.to(DEVICE)
    fxpass.parallelize(pipe, 2, executor="lockstep")
    try:
        if when == "after":
            small.run()
            getattr(pipe, offload)()
        with pytest.raises(fxpass.CaptureError, match=r"offloading .* moves the weights .* remove the hook"):
            small.run()
    finally:
        fxpass.restore(pipe)


@ON_A_GPU
def test_group_offloading_to_the_host_is_refused_with_what_to_do() -> None:
    small = start()
    pipe: Any = small.pipeline
    pipe.to(DEVICE)
    fxpass.parallelize(pipe, 2, executor="lockstep")
    try:
        small.run()
        onto, off = torch.device(DEVICE), torch.device("cpu")
        pipe.unet.enable_group_offload(onload_device=onto, offload_device=off, offload_type="leaf_level")
        with pytest.raises(fxpass.CaptureError, match=r"group offloading .* moves the weights .* remove the hook"):
            small.run()
    finally:
        fxpass.restore(pipe)
