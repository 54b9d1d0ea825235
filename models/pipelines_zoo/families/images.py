"""Transformers of images, each with the text encoders of its family."""

from __future__ import annotations

from typing import Any

from ..pictures import mask, picture
from ..recipe import Part, Recipe
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
_qwen = Recipe({"vae": {"latents_mean": [0.1] * 4, "latents_std": [0.9] * 4}})


def _chroma(parts: Any) -> Any:
    from ..parts import model

    transformer: Any = model("chroma")
    transformer.register_to_config(guidance_embeds=False)  # this pipeline reads it, though the class has none
    return transformer


_pixart = Recipe({"transformer": Part("pixart_sigma")})
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
    "HunyuanImagePipeline": Recipe(
        {
            "transformer": {"in_channels": 8, "out_channels": 8, "text_embed_2_dim": 20},
            "vae": {"scaling_factor": 0.7},
            "text_encoder": 24,
            "text_encoder_2": 20,
        }
    ),
    "HunyuanImageRefinerPipeline": Recipe(
        {"transformer": Part("hunyuan_image_refiner", options={"in_channels": 8, "out_channels": 4})}
    ),
    "Ideogram4Pipeline": Recipe({"text_encoder": Part(kind="Qwen3VLModel")}, {"guidance_schedule": [3.0, 2.0]}),
    "Krea2Pipeline": Recipe(
        {"text_encoder": Part(options={"text_config": layers(4)}), "text_encoder_select_layers": (1, 2, 3)}
    ),
    "BriaFiboEditPipeline": Recipe(call={"prompt": '{"edit_instruction": "a red circle"}'}),
    "CogView4ControlPipeline": Recipe({"transformer": {"in_channels": 8}}),
    **dict.fromkeys(("SanaPipeline", "SanaPAGPipeline"), _sana),
    "SanaControlNetPipeline": _sana,
    **dict.fromkeys(
        ("SanaSprintPipeline", "SanaSprintImg2ImgPipeline"),
        _sana | Recipe({"transformer": {"guidance_embeds": True}, "scheduler": Part(kind="SCMScheduler")}),
    ),
    "Lumina2Pipeline": Recipe({"text_encoder": Part(kind="Gemma2Model")}),
    "LuminaPipeline": Recipe({"text_encoder": Part(kind="GemmaModel")}),
    **{
        f"ZImage{kind}Pipeline": Recipe({"text_encoder": Part(kind="Qwen3Model")})
        for kind in ("", "Img2Img", "Inpaint", "ControlNet", "ControlNetInpaint", "Omni")
    },
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
}
