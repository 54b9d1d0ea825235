"""What people do with a pipeline besides calling it: each use as a function of a small Stable Diffusion pipeline."""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import diffusers
import torch
from torch import Tensor

from .build import Small, build
from .pictures import picture
from .recipe import Recipe
from .tokenizers import LENGTH

KIND = "StableDiffusionPipeline"


@dataclass(frozen=True)
class Use:
    """One use.

    Attributes:
        title: what is done, in a few words.
        act: does it to a pipeline; returns another pipeline if that is what is called from then on.
        call: arguments that differ from the usual ones.
        needs: the package that it needs.
        refused: how the error begins, where a split pipeline has to refuse it.
        widely: it is also measured under a stale strategy, with worker processes, and on the ranks of torchrun.
        breaks: it ends in the user's own error on one of the ranks of torchrun, on which alone it is measured.
    """

    title: str
    act: Callable[[Any], Any] = lambda pipeline: None
    call: Mapping[str, Any] = field(default_factory=dict)
    needs: str = ""
    refused: str = ""
    widely: bool = False
    breaks: bool = False

    @property
    def missing(self) -> str:
        return self.needs if self.needs and find_spec(self.needs) is None else ""

    def apply(self, small: Small) -> Small:
        """Do it: the pipeline that is called from then on, and its arguments."""
        pipeline = self.act(small.pipeline) or small.pipeline
        pipeline.set_progress_bar_config(disable=True)
        return Small(pipeline, small.recipe | Recipe(call=self.call))


def start() -> Small:
    """The pipeline that uses begin with."""
    return build(KIND)


def draw(*shape: int, scale: float = 0.3, seed: int = 0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _scheduler(pipe: Any) -> None:
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)


def _image_to_image(pipe: Any) -> Any:
    return diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)


def _there_and_back(pipe: Any) -> Any:
    return diffusers.StableDiffusionPipeline.from_pipe(_image_to_image(pipe))


def _automatic(pipe: Any) -> Any:
    return diffusers.AutoPipelineForInpainting.from_pipe(pipe)


def _stop(pipe: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
    pipe._interrupt = step == 0
    return values


def _fail(pipe: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
    raise KeyError("the user's own error")


def _failing_callback(pipe: Any) -> None:
    with suppress(KeyError):
        pipe("a circle", height=64, width=64, num_inference_steps=2, callback_on_step_end=_fail)


def _fail_on_one(pipe: Any, *given: Any) -> Any:
    return given[-1] if os.environ["RANK"] == "0" else _fail(pipe, *given)


def _failing_on_one(pipe: Any) -> None:
    with suppress(KeyError):
        pipe("a circle", height=64, width=64, num_inference_steps=3, callback_on_step_end=_fail_on_one)


def _smaller_first(pipe: Any) -> None:
    pipe("a circle", height=32, width=32, num_inference_steps=1)


def _free_u(pipe: Any) -> None:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


def _unfused(pipe: Any) -> None:
    pipe.fuse_qkv_projections()
    pipe.unfuse_qkv_projections()


def _saved(pipe: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        return type(pipe).from_pretrained(folder, requires_safety_checker=False)


def _inversion(pipe: Any) -> None:
    pipe.load_textual_inversion({"<circle>": draw(1, pipe.text_encoder.config.hidden_size, scale=1.0)})


def _processors(pipe: Any) -> None:
    pipe.unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())


def _slices_and_tiles(pipe: Any) -> None:
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()


def _adapter_state(pipe: Any) -> dict[str, dict[str, Tensor]]:
    """An IP-Adapter of four tokens for each cross-attention layer of the UNet."""
    width = pipe.unet.config.cross_attention_dim
    keys = {}
    places = [name for name in pipe.unet.attn_processors if "attn2" in name]
    for i, name in enumerate(places):
        layer = pipe.unet.get_submodule(name.removesuffix(".processor"))
        for part in ("k", "v"):
            keys[f"{2 * i + 1}.to_{part}_ip.weight"] = draw(layer.to_k.out_features, width, seed=i)
    projection = {
        "proj.weight": draw(4 * width, 24), "proj.bias": draw(4 * width), "norm.weight": 1 + draw(width),
        "norm.bias": draw(width),
    }  # fmt: skip
    return {"image_proj": projection, "ip_adapter": keys}


def _ip_adapter(pipe: Any) -> None:
    pipe.load_ip_adapter(_adapter_state(pipe), subfolder="", weight_name="", image_encoder_folder=None)
    pipe.set_ip_adapter_scale(0.7)


def _no_ip_adapter(pipe: Any) -> None:
    _ip_adapter(pipe)
    pipe.unload_ip_adapter()


def _lora_state(pipe: Any) -> dict[str, Tensor]:
    state = {}
    for name, layer in pipe.unet.named_modules():
        if name.endswith(("to_q", "to_v")):
            state[f"unet.{name}.lora_A.weight"] = draw(4, layer.in_features)
            state[f"unet.{name}.lora_B.weight"] = draw(layer.out_features, 4, seed=1)
    return state


def _lora(pipe: Any) -> None:
    pipe.load_lora_weights(_lora_state(pipe), adapter_name="style")


def _scaled_lora(pipe: Any) -> None:
    _lora(pipe)
    pipe.set_adapters(["style"], [0.4])


def _fused_lora(pipe: Any) -> None:
    _lora(pipe)
    pipe.fuse_lora(lora_scale=0.8)


def _unloaded_lora(pipe: Any) -> None:
    _lora(pipe)
    pipe.unload_lora_weights()


def _swapped_lora(pipe: Any) -> None:
    _lora(pipe)
    other = {name: weight.flip(0) for name, weight in _lora_state(pipe).items()}
    pipe.load_lora_weights(other, adapter_name="style", hotswap=True)


def _torchao(pipe: Any) -> None:
    torchao: Any = importlib.import_module("torchao.quantization")
    torchao.quantize_(pipe.unet, torchao.Int8WeightOnlyConfig())


def _quanto(pipe: Any) -> None:
    quanto: Any = importlib.import_module("optimum.quanto")
    quanto.quantize(pipe.unet, weights=quanto.qint8)
    quanto.freeze(pipe.unet)


def _layerwise_casting(pipe: Any) -> None:
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def _leaf_offload(pipe: Any) -> None:
    pipe.unet.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")


def _embedding(_: Any) -> list[Tensor]:
    return [torch.cat([draw(1, 1, 24, seed=3), draw(1, 1, 24, seed=4)])]


_half_way = {"strength": 0.4, "num_inference_steps": 5, "image": lambda _: picture()}

USES: dict[str, Use] = {
    "scheduler": Use("another scheduler", _scheduler, widely=True),
    "size": Use("another size", call={"height": 48, "width": 80}, widely=True),
    "sizes": Use("a second size after the first", _smaller_first),
    "batch": Use(
        "two prompts", call={"prompt": ["a red circle", "a box"], "negative_prompt": ["blue", ""]}, widely=True
    ),
    "length": Use("embeddings of another length", call={
        "prompt": None, "negative_prompt": None, "prompt_embeds": lambda _: draw(1, LENGTH + 13, 24),
        "negative_prompt_embeds": lambda _: draw(1, LENGTH + 13, 24, seed=1),
    }),
    "guidance": Use("without guidance", call={"guidance_scale": 1.0}),
    "from_pipe": Use("`from_pipe` to image-to-image", _image_to_image, widely=True),
    "from_pipe_back": Use("`from_pipe` there and back", _there_and_back),
    "auto": Use("`AutoPipelineForInpainting.from_pipe`", _automatic),
    "few_steps": Use("image-to-image with two steps of five", _image_to_image, _half_way),
    "stopped": Use(
        "a callback that interrupts", call={"callback_on_step_end": lambda _: _stop, "num_inference_steps": 3}
    ),
    "failed": Use("a callback that raised in the call before", _failing_callback, widely=True),
    "failed_on_one": Use(
        "a callback that raised on one rank: a `DisagreementError` on all when it begins the next picture, then",
        _failing_on_one, breaks=True,
    ),
    "to": Use("`pipe.to(\"cpu\")`", lambda pipe: pipe.to("cpu")),
    "dtype": Use("`pipe.to(torch.float64)`", lambda pipe: pipe.to(torch.float64)),
    "channels_last": Use("channels last", lambda pipe: pipe.unet.to(memory_format=torch.channels_last) and None),
    "fused": Use("`fuse_qkv_projections`", lambda pipe: pipe.fuse_qkv_projections(), widely=True),
    "unfused": Use("`unfuse_qkv_projections`", _unfused),
    "freeu": Use("`enable_freeu`", _free_u),
    "slices": Use("`enable_attention_slicing`", lambda pipe: pipe.enable_attention_slicing()),
    "processors": Use("`set_attn_processor`", _processors),
    "vae": Use("`vae.enable_slicing` and `enable_tiling`", _slices_and_tiles, widely=True),
    "saved": Use("`save_pretrained`, and loaded again", _saved),
    "inversion": Use("textual inversion", _inversion, {"prompt": "a red <circle>"}),
    "ip_adapter": Use(
        "IP-Adapter loaded and scaled", _ip_adapter, {"ip_adapter_image_embeds": _embedding}, widely=True
    ),
    "no_ip_adapter": Use("IP-Adapter unloaded", _no_ip_adapter),
    "lora": Use("LoRA loaded", _lora, needs="peft"),
    "scaled_lora": Use("LoRA scaled", _scaled_lora, needs="peft", widely=True),
    "fused_lora": Use("LoRA fused", _fused_lora, needs="peft"),
    "unloaded_lora": Use("LoRA unloaded", _unloaded_lora, needs="peft"),
    "swapped_lora": Use("LoRA swapped (`hotswap=True`)", _swapped_lora, needs="peft", widely=True),
    "torchao": Use("weights in int8 by torchao", _torchao, needs="torchao", widely=True),
    "quanto": Use("weights in int8 by optimum-quanto", _quanto, needs="optimum"),
    "layerwise_casting": Use(
        "`enable_layerwise_casting` of the UNet", _layerwise_casting, refused="layerwise casting"
    ),
    "model_offload": Use(
        "`enable_model_cpu_offload`",
        lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
        refused="offloading of whole models",
    ),
    "group_offload": Use("`enable_group_offload` of the UNet", _leaf_offload, refused="group offloading"),
}  # fmt: skip
