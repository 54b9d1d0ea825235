"""Stable Diffusion XL: a UNet, two CLIP text encoders, sizes as conditions."""

from __future__ import annotations

from typing import Any

import diffusers

from ..pictures import picture
from ..recipe import Part, Recipe
from .unets import NET, TWO, _motion

_added: dict[str, Any] = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 16,
}
_texts: dict[str, Any] = {"text_encoder": 8, "text_encoder_2": 16}
_unet = Part("unet_sdxl", options=_added)
_levels: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [2, 4, 4],
    "use_linear_projection": True,
}
_two: dict[str, Any] = TWO | _added
BASE = Recipe({"unet": _unet, **_texts})
_controlled = BASE | Recipe({"controlnet": NET | _levels | _added})
_united = BASE | Recipe(
    {
        "controlnet": NET | _added | {
            "block_out_channels": (16, 32, 32), **_levels, "num_control_type": 6,
            "num_trans_channel": 16, "num_trans_head": 2, "num_trans_layer": 1, "num_proj_channel": 16,
        }
    },
    {"control_mode": [0], "control_image": lambda _: [picture(1)]},
)  # fmt: skip


def _adapter(_: Any) -> Any:
    return diffusers.T2IAdapter(
        channels=[16, 32, 32, 32], num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter_xl"
    )


RECIPES: dict[str, Recipe] = {
    **{
        f"StableDiffusionXL{kind}Pipeline": BASE
        for kind in ("", "Img2Img", "Inpaint", "PAG", "PAGImg2Img", "PAGInpaint")
    },
    "StableDiffusionXLInstructPix2PixPipeline": BASE
    | Recipe({"unet": Part("unet_sdxl", options=_added | {"in_channels": 8})}),
    "StableDiffusionXLAdapterPipeline": BASE | Recipe({"adapter": _adapter}),
    **{
        f"StableDiffusionXLControlNet{kind}Pipeline": _controlled
        for kind in ("", "Img2Img", "Inpaint", "PAG", "PAGImg2Img")
    },
    **{f"StableDiffusionXLControlNetUnion{kind}Pipeline": _united for kind in ("", "Img2Img", "Inpaint")},
    "StableDiffusionXLControlNetXSPipeline": Recipe(
        {
            "unet": Part("unet_sd", options=_two | {"layers_per_block": 2}),
            **_texts,
            "controlnet": lambda parts: diffusers.ControlNetXSAdapter.from_unet(
                parts["unet"],
                size_ratio=0.5,
                conditioning_embedding_out_channels=(8, 16),  # pyright: ignore[reportArgumentType]
            ),
        }
    ),
    "TextToVideoZeroSDXLPipeline": BASE | Recipe(call={"video_length": 3, "t0": 0, "t1": 1, "num_inference_steps": 3}),
    "AnimateDiffSDXLPipeline": Recipe(
        {"unet": Part("unet_sd", options=_two), **_texts, "motion_adapter": _motion}, {"num_frames": 4}
    ),
    **dict.fromkeys(
        ("KolorsPipeline", "KolorsImg2ImgPipeline", "KolorsPAGPipeline"),
        Recipe({"unet": Part("unet_sdxl", options=_added | {"projection_class_embeddings_input_dim": 6 * 8 + 24})}),
    ),
}
