"""Pipelines of several stages that are no Kandinsky: Stable Cascade, Würstchen, unCLIP, Shap-E."""

from __future__ import annotations

from typing import Any

from ..pictures import embedding
from ..recipe import OMIT, Part, Recipe

_vq: dict[str, Any] = {"bottleneck_blocks": 1, "embed_dim": 16, "latent_channels": 4, "num_vq_embeddings": 32}
_large: dict[str, Any] = {"height": 512, "width": 512}
_prior = Part("cascade_prior", options={"clip_text_in_channels": 24})
_decoder = Part("cascade_decoder", options={"effnet_in_channels": 4})
_wuerst: dict[str, Any] = {"c_in": 4, "c": 32, "c_cond": 24, "c_r": 16, "depth": 2, "nhead": 2}
_wuerst_decoder: dict[str, Any] = {
    "c_r": 16, "c_cond": 24, "c_hidden": [16, 32], "nhead": [-1, 2], "blocks": [1, 1], "level_config": ["CT", "CTA"],
    "inject_effnet": [False, True], "effnet_embd": 4, "clip_embd": 24,
}  # fmt: skip
_finer: dict[str, Any] = {
    "sample_size": 64, "in_channels": 6, "out_channels": 3, "block_out_channels": (16, 32), "layers_per_block": 1,
    "down_block_types": ("ResnetDownsampleBlock2D",) * 2, "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    "norm_num_groups": 8,
}  # fmt: skip
_guess = Part(options={"variance_type": "fixed_small_log", "prediction_type": "sample", "clip_sample_range": 5.0})
_learned = Part(options={"variance_type": "learned_range", "prediction_type": "epsilon"})
_unclip = Recipe(
    {
        "decoder": {
            "in_channels": 3, "out_channels": 6, "class_embed_type": "identity", "block_out_channels": (16, 32),
            "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "resnet_time_scale_shift": "scale_shift",
        },
        "text_proj": {"clip_embeddings_dim": 24, "time_embed_dim": 64, "cross_attention_dim": 24},
        "text_encoder": 24, "super_res_first": _finer, "super_res_last": _finer, "prior_scheduler": _guess,
        "decoder_scheduler": _learned,
        "super_res_scheduler": Part(options={"variance_type": "fixed_small_log", "prediction_type": "epsilon"}),
    }
)  # fmt: skip
_shape: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "embedding_dim": 24, "num_embeddings": 32,
    "embedding_proj_dim": 24, "time_embed_dim": 64, "clip_embed_dim": 48, "additional_embeddings": 0,
    "time_embed_act_fn": "gelu", "norm_in_type": "layer", "encoder_hid_proj_type": None, "added_emb_type": None,
}  # fmt: skip
_renderer: dict[str, Any] = {"param_shapes": ((8, 93), (8, 8), (8, 8), (8, 8)), "d_latent": 24, "d_hidden": 8}
_shaped = Recipe({"prior": _shape, "shap_e_renderer": _renderer}, {"output_type": "latent"})

RECIPES: dict[str, Recipe] = {
    "StableCascadePriorPipeline": Recipe({"prior": _prior, "text_encoder": 24}, _large | {"images": OMIT}),
    "StableCascadeDecoderPipeline": Recipe(
        {"decoder": _decoder, "vqgan": _vq, "text_encoder": 24},
        {"image_embeddings": lambda _: embedding(1, 4, 12, 12)},
    ),
    "StableCascadeCombinedPipeline": Recipe(
        {
            "decoder": _decoder, "vqgan": _vq, "text_encoder": 24, "prior_prior": _prior, "prior_text_encoder": 24,
            "prior_image_encoder": None, "prior_feature_extractor": None,
        },
        _large | {"images": OMIT},
    ),
    "ShapEPipeline": _shaped | Recipe({"text_encoder": 24}),
    "ShapEImg2ImgPipeline": _shaped | Recipe({"image_encoder": 24, "image_processor": Part()}),
    "WuerstchenPriorPipeline": Recipe({"prior": _wuerst, "text_encoder": 24}, _large),
    "WuerstchenDecoderPipeline": Recipe(
        {"decoder": _wuerst_decoder, "vqgan": _vq, "text_encoder": 24},
        {"image_embeddings": lambda _: embedding(1, 4, 12, 12)},
    ),
    "WuerstchenCombinedPipeline": Recipe(
        {
            "decoder": _wuerst_decoder, "vqgan": _vq, "text_encoder": 24, "prior_prior": _wuerst,
            "prior_text_encoder": 24,
        },
        _large,
    ),
    "UnCLIPPipeline": _unclip | Recipe({"prior": {"num_embeddings": 32, "embedding_dim": 24}}),
    "UnCLIPImageVariationPipeline": _unclip | Recipe({"image_encoder": 24, "feature_extractor": Part()}),
}  # fmt: skip
