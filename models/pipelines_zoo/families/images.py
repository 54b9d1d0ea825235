"""Transformers of images, each with the text encoders of its family."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.pipelines.joyimage.image_processor import JoyImageEditImageProcessor

from ..pictures import SIZE, mask, picture
from ..recipe import OMIT, Part, Recipe, left_out
from .flux import layers

_sd3 = Recipe({"text_encoder": 8, "text_encoder_2": 12, "text_encoder_3": 24})
_sd3_wide = _sd3 | Recipe({"transformer": {"in_channels": 16, "out_channels": 16}, "vae": {"latent_channels": 16}})
#: as the real one, eight pixels per row of the latent
EIGHTH: dict[str, Any] = {
    "block_out_channels": (8, 8, 8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
_lengths = {"text_len": 77, "text_len_t5": 256}
_bert_and_t5 = Recipe({"text_encoder": 24, "text_encoder_2": 16, "transformer": _lengths, "vae": EIGHTH})
_dc: dict[str, Any] = {"latent_channels": 4}
_sana = Recipe({"vae": _dc, "text_encoder": Part(kind="Gemma2Model")}, {"complex_human_instruction": None})
_moments = {"latents_mean": [0.1] * 4, "latents_std": [0.9] * 4}
_qwen = Recipe({"vae": _moments})


def _chroma(parts: Any) -> Any:
    from ..parts import model

    transformer: Any = model("chroma")
    transformer.register_to_config(guidance_embeds=False)  # this pipeline reads it, though the class has none
    return transformer


class _SmallImages(JoyImageEditImageProcessor):
    """Makes small images: the real one resizes to one of a few sizes of about 1024 * 1024 pixels."""

    def get_default_height_width(self, *_: Any) -> tuple[int, int]:
        return SIZE, SIZE


_z = Recipe({"transformer": Part("z_image"), "text_encoder": Part(kind="Qwen3Model")})
_pixart = Recipe({"transformer": Part("pixart_sigma")})
_smaller = Recipe(constants={"calculate_dimensions": lambda area, ratio: (64, 64, None)})
_longcat = Recipe({"transformer": {"in_channels": 64}, "vae": {"latent_channels": 16}})
#: sixteen pixels per row of the latent
_fibo = Recipe(
    {
        "transformer": {"in_channels": 4, "joint_attention_dim": 48, "text_encoder_dim": 24},
        "vae": Part("vae_wan22_decode", options={
            "dim_mult": [1, 2, 2, 2], "temperal_downsample": [False, True, True], "scale_factor_spatial": 16,
            "latents_mean": [0.1, -0.1, 0.2, 0.0], "latents_std": [0.9, 1.1, 1.0, 0.8],
        }),
        "text_encoder": 24,
    }
)  # fmt: skip
RECIPES: dict[str, Recipe] = {
    **{f"StableDiffusion3{kind}Pipeline": _sd3 for kind in ("", "Img2Img", "PAG", "PAGImg2Img")},
    "StableDiffusion3ControlNetPipeline": _sd3 | Recipe({"controlnet": {"extra_conditioning_channels": 0}}),
    "StableDiffusion3ControlNetInpaintingPipeline": _sd3
    | Recipe(
        {"controlnet": {"extra_conditioning_channels": 1}},
        {"control_image": lambda _: picture(1), "control_mask": lambda _: mask()},
    ),
    "StableDiffusion3InpaintPipeline": _sd3_wide,
    "ChromaInpaintPipeline": Recipe({"transformer": _chroma}),
    **dict.fromkeys(("PixArtAlphaPipeline", "PixArtSigmaPipeline", "PixArtSigmaPAGPipeline"), _pixart),
    "DiTPipeline": Recipe({"transformer": {"num_embeds_ada_norm": 1000}}, call={"class_labels": [1]}),
    "ErnieImagePipeline": Recipe(
        {"transformer": {"in_channels": 32, "out_channels": 32}, "pe": None, "pe_tokenizer": None}
    ),
    "HiDreamImagePipeline": Recipe(
        {
            "text_encoder": 8,
            "text_encoder_2": 8,
            "text_encoder_3": 24,
            "text_encoder_4": Part(width=20, options=layers(4)),
        }
    ),
    **dict.fromkeys(("HunyuanDiTPipeline", "HunyuanDiTPAGPipeline"), _bert_and_t5),
    "HunyuanDiTControlNetPipeline": _bert_and_t5 | Recipe({"controlnet": _lengths}),
    "GlmImagePipeline": Recipe(
        {"processor": None, "vision_language_encoder": None, "vae": _moments},
        {"image": OMIT, "prior_token_ids": lambda _: torch.arange(256)[None] % 32},
    ),
    **dict.fromkeys(
        ("JoyImageEditPipeline", "JoyImageEditPlusPipeline"),
        Recipe(constants={"vae_image_processor": _SmallImages(), "image_processor": _SmallImages()}),
    ),
    "HunyuanImagePipeline": Recipe(
        {
            "transformer": {"in_channels": 8, "out_channels": 8, "text_embed_2_dim": 20},
            "vae": {"scaling_factor": 0.7},
            "text_encoder": 24,
            "text_encoder_2": 20,
        }
    ),
    "HunyuanImageRefinerPipeline": Recipe(
        {"transformer": Part("hunyuan_image_refiner", options={"in_channels": 16, "out_channels": 8})}
    ),
    "Ideogram4Pipeline": Recipe(
        {
            "transformer": {"in_channels": 32},
            "unconditional_transformer": {"in_channels": 32},
            "text_encoder": Part(kind="Qwen3VLModel", width=12),
        },
        {"guidance_schedule": [3.0, 2.0], "max_sequence_length": 64},
        {"QWEN3_VL_ACTIVATION_LAYERS": (0, 1)},
    ),
    "Krea2Pipeline": Recipe(
        {
            "text_encoder": Part(options={"text_config": layers(4)}),
            "text_encoder_select_layers": (1, 2, 3),
        }
    ),
    "CogView4ControlPipeline": Recipe({"transformer": {"in_channels": 8}}),
    **dict.fromkeys(("SanaPipeline", "SanaPAGPipeline"), _sana),
    "SanaControlNetPipeline": _sana,
    **dict.fromkeys(
        ("SanaSprintPipeline", "SanaSprintImg2ImgPipeline"),
        _sana | Recipe({"transformer": {"guidance_embeds": True}, "scheduler": Part(kind="SCMScheduler")}),
    ),
    "Lumina2Pipeline": Recipe({"text_encoder": Part(kind="Gemma2Model")}),
    "LuminaPipeline": Recipe({"text_encoder": Part(kind="GemmaModel")}),
    **{f"ZImage{kind}Pipeline": _z for kind in ("", "Img2Img", "Inpaint")},
    "ZImageControlNetPipeline": _z | Recipe({"controlnet": Part("controlnet_z_image")}),
    "ZImageControlNetInpaintPipeline": _z
    | Recipe({"controlnet": Part("controlnet_z_image_refiner", options={"control_in_dim": 9})}),
    **{
        f"QwenImage{kind}Pipeline": _qwen
        for kind in (
            "",
            "Img2Img",
            "Inpaint",
            "ControlNet",
            "ControlNetInpaint",
            "Edit",
            "EditInpaint",
            "EditPlus",
            "Layered",
        )
    },
    "PRXPixelPipeline": Recipe({"text_encoder": Part(kind="Qwen3Model"), "transformer": {"in_channels": 3}}),
    "AmusedPipeline": Recipe({"scheduler": {"mask_token_id": 33}}),
    "AmusedImg2ImgPipeline": Recipe({"scheduler": {"mask_token_id": 33}}),
    "AmusedInpaintPipeline": Recipe({"scheduler": {"mask_token_id": 33}}),
    "QwenImage21Pipeline": Recipe(
        {"vae": {"z_dim": 16, "latents_mean": [0.1, -0.1] * 8, "latents_std": [0.9, 1.1] * 8}},
        {"output_resolution": 64, "image": OMIT},
    ),
    "QwenImageControlNetInpaintPipeline": _qwen
    | Recipe({"controlnet": {"extra_condition_channels": 4}}, {"control_mask": lambda _: mask()}),
    **{f"QwenImage{kind}Pipeline": _qwen | _smaller for kind in ("Edit", "EditInpaint")},
    "QwenImageEditPlusPipeline": _qwen
    | Recipe(
        constants={
            "CONDITION_IMAGE_SIZE": 32 * 32,
            "VAE_IMAGE_SIZE": 64 * 64,
            "calculate_dimensions": lambda area, ratio: (64, 64),
        }
    ),
    "QwenImageLayeredPipeline": _qwen
    | Recipe(
        {"transformer": Part("qwen_image_layered")},
        {"layers": 2},
        {"calculate_dimensions": lambda area, ratio: (64, 64)},
    ),
    "LongCatImagePipeline": _longcat | Recipe(call={"enable_prompt_rewrite": False}),
    "LongCatImageEditPipeline": _longcat | Recipe(constants={"calculate_dimensions": lambda area, ratio: (64, 64)}),
    "NucleusMoEImagePipeline": Recipe(call={"return_index": -1}),
    "OmniGenPipeline": left_out("needs the package torchvision"),
    "BriaFiboPipeline": _fibo,
    "BriaFiboEditPipeline": _fibo | Recipe(call={"prompt": '{"edit_instruction": "a red circle"}'}),
    "BriaFibo2Pipeline": Recipe(
        {"text_encoder": Part(width=8, options={"text_config": layers(36)}), "transformer": {"in_channels": 8}},
        {"image": OMIT},
    ),
}
