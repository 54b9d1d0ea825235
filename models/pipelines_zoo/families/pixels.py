"""UNets of pixels without text, DeepFloyd IF, and older pipelines of their own kind."""

from __future__ import annotations

from typing import Any

from ..pictures import mask, picture
from ..recipe import Part, Recipe, left_out
from ..tokenizers import VOCABULARY

_stage: dict[str, Any] = {"unet": Part("deep_floyd", options={"sample_size": 64}), "text_encoder": 20}
_finer: dict[str, Any] = {"unet": Part("deep_floyd_upscaler", options={"sample_size": 64}), "text_encoder": 32}
_rgb: dict[str, Any] = {"in_channels": 3, "out_channels": 3}


def _latent_bert(_: Any) -> Any:
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    options: dict[str, Any] = {
        "vocab_size": VOCABULARY, "encoder_layers": 1, "encoder_ffn_dim": 48, "encoder_attention_heads": 2,
        "head_dim": 12, "d_model": 24,
    }  # fmt: skip
    return LDMBertModel(LDMBertConfig(**options)).eval()


RECIPES: dict[str, Recipe] = {
    "IFPipeline": Recipe(_stage),
    "IFImg2ImgPipeline": Recipe(_stage),
    "IFInpaintingPipeline": Recipe(_stage),
    "IFSuperResolutionPipeline": Recipe(_finer, {"image": lambda _: picture(size=16)}),
    "IFImg2ImgSuperResolutionPipeline": Recipe(
        _finer, {"image": lambda _: picture(size=16), "original_image": lambda _: picture(1)}
    ),
    "IFInpaintingSuperResolutionPipeline": Recipe(
        _finer, {"image": lambda _: picture(size=16), "original_image": lambda _: picture(1)}
    ),
    "DDPMPipeline": Recipe({"unet": _rgb}),
    "DDIMPipeline": Recipe({"unet": _rgb}),
    "PNDMPipeline": Recipe({"unet": _rgb}, {"num_inference_steps": 8}),
    "ConsistencyModelPipeline": Recipe({"unet": _rgb}),
    "KarrasVePipeline": Recipe({"unet": _rgb}),
    "ScoreSdeVePipeline": Recipe({"unet": _rgb}),
    "RePaintPipeline": Recipe(
        {"unet": _rgb},
        {"image": lambda _: picture(size=32), "mask_image": lambda _: mask(32), "jump_length": 1, "jump_n_sample": 1},
    ),
    "LDMSuperResolutionPipeline": Recipe(
        {"vqvae": {"latent_channels": 3}, "unet": {"in_channels": 6, "out_channels": 3}},
        {"image": lambda _: picture(size=32)},
    ),
    "DanceDiffusionPipeline": Recipe(
        {"unet": {"sample_size": 512, "sample_rate": 1024}, "scheduler": Part(kind="IPNDMScheduler")},
        {"audio_length_in_s": 0.5},
    ),
    "LDMTextToImagePipeline": Recipe({"bert": _latent_bert, "unet": Part(kind="UNet2DConditionModel")}),
    **dict.fromkeys(
        ("LLaDA2Pipeline", "DiffusionGemmaPipeline"),
        left_out("diffuses text with a language model, which takes no timestep: there is no latent to split"),
    ),
}
