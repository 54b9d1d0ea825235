"""What pipelines hold beside their denoisers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from fxpass.models.beside import beside
from fxpass.models.catalog import catalog
from fxpass.models.catalog.parts import BESIDE, ENCODERS
from fxpass.models.resolve import Options
from fxpass.passes.targets import find
from fxpass.tools.parts import parts_of
from tests.tools.command import fxpass
from tests.tools.pipelines import write_pipeline


def clip(cls: Any, **sizes: Any) -> nn.Module:
    return cls(transformers.CLIPTextConfig(**sizes))


def t5(cls: Any, config: Any, vocabulary: int) -> nn.Module:
    return cls(config(vocab_size=vocabulary, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                      feed_forward_proj="gated-gelu"))  # fmt: skip


def qwen() -> nn.Module:
    text: dict[str, Any] = {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    }  # fmt: skip
    vision: dict[str, Any] = {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


SMALL: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
LARGE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
}
HUGE: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
}
LLAMA: dict[str, Any] = {"vocab_size": 128320, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8}  # fmt: skip
BUILD: dict[str, Callable[[], Any]] = {
    "CLIP-L": lambda: clip(transformers.CLIPTextModel, **SMALL),
    "CLIP-L with projection": lambda: clip(transformers.CLIPTextModelWithProjection, projection_dim=768, **SMALL),
    "OpenCLIP-H": lambda: clip(transformers.CLIPTextModel, **LARGE),
    "OpenCLIP-bigG": lambda: clip(transformers.CLIPTextModelWithProjection, projection_dim=1280, **HUGE),
    "T5-XXL": lambda: t5(transformers.T5EncoderModel, transformers.T5Config, 32128),
    "UMT5-XXL": lambda: t5(transformers.UMT5EncoderModel, transformers.UMT5Config, 256384),
    "CLIP-H of images": lambda: transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(patch_size=14, projection_dim=1024, **{**HUGE, "num_attention_heads": 16})
    ),
    "Gemma 2 2B": lambda: transformers.Gemma2Model(transformers.Gemma2Config()),
    "Llama 3 8B": lambda: transformers.LlamaModel(transformers.LlamaConfig(**LLAMA)),
    "Qwen2.5-VL 7B": qwen,
}


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_has_as_many_parameters_as_the_one_of_its_configuration(name: str) -> None:
    with torch.device("meta"):
        built = BUILD[name]()
    assert sum(each.numel() for each in built.parameters()) == ENCODERS[name]


def test_every_pipeline_names_a_denoiser_encoders_and_a_decoder_that_exist() -> None:
    for name, (encoders, decoder) in BESIDE.items():
        assert name in catalog
        assert set(encoders) <= set(ENCODERS)
        assert decoder is None or decoder in catalog


@pytest.mark.parametrize(("name", "options"), [("sdxl", Options(height=512)), ("qwen-image", Options(width=256))])
def test_a_decode_makes_the_picture_of_the_denoiser(name: str, options: Options) -> None:
    held = beside(name, options)
    assert held is not None
    assert held.decoder is not None
    (latent,) = held.decoder.kwargs.values()
    size = options.height or options.width
    assert isinstance(latent, FakeTensor)
    with latent.fake_mode:
        assert tuple(held.decoder.module(latent).shape[-2:]) == (size, size)


def test_a_model_alone_has_nothing_beside_it(tmp_path: Path) -> None:
    assert beside("small:unet_sd", Options()) is beside("sd-vae-decode", Options()) is None
    assert beside(str(tmp_path), Options()) is None


def test_parts_of_a_pipeline_count_as_many_bytes_as_they_have(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "pipeline")
    pipeline: Any = StableDiffusionPipeline.from_pretrained(folder)
    parts = parts_of(str(folder), Options())
    assert parts is not None
    for name in ("vae", "text_encoder"):
        held = getattr(pipeline, name)
        stored = {id(each): each for each in (*held.parameters(), *held.buffers()) if each.is_floating_point()}
        assert parts.weights[name] == sum(each.nbytes for each in stored.values())
    encoder = next((folder / "text_encoder").glob("*.safetensors"))
    torch.save(load_file(encoder), encoder.with_name("pytorch_model.bin"))
    encoder.with_name("training_args.bin").write_bytes(b"no tensors")
    encoder.unlink()
    assert parts_of(str(folder), Options()).weights == parts.weights
    weights = next((folder / "vae").glob("*.safetensors"))
    weights.with_suffix(".fp16.safetensors").write_bytes(weights.read_bytes())  # a variant
    halves = beside(str(folder), Options(dtype=torch.float16))
    assert halves is not None
    assert halves.weights == {name: size // 2 for name, size in parts.weights.items()}
    assert 0 < parts.decoding(2, find("cpu")) < parts.decoding(1, find("cpu"))


def test_the_memory_of_a_pipeline_is_that_of_all_its_parts(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "pipeline")
    alone = fxpass("plan", folder / "unet", "--target", "H100").stdout
    whole = fxpass("plan", folder, "--target", "H100").stdout
    assert "text_encoder" not in alone
    assert " vae " in whole
    assert " text_encoder " in whole
    assert "activations of decoding" in whole
