"""Pipelines of their own kind."""

from __future__ import annotations

from typing import Any

from ..pictures import video
from ..recipe import OMIT, Part, Recipe, left_out
from ..tokenizers import LENGTH, VOCABULARY
from .videos import _ltx_2

_words: dict[str, Any] = {
    "prefix_length": LENGTH, "prefix_inner_dim": 24, "prefix_hidden_dim": 16, "vocab_size": VOCABULARY,
    "n_positions": 64, "n_embd": 24, "n_layer": 1, "n_head": 2,
}  # fmt: skip

RECIPES: dict[str, Recipe] = {
    "UniDiffuserPipeline": Recipe(
        {"unet": {"num_text_tokens": LENGTH}, "text_encoder": 24, "image_encoder": 12, "text_decoder": _words},
        {"image": OMIT},
    ),
    "VQDiffusionPipeline": Recipe(
        {
            "transformer": Part("transformer_2d_vectorised", options={"sample_size": 32}),
            "vqvae": {"num_vq_embeddings": 11},
            "scheduler": {"num_vec_classes": 12},
            "learned_classifier_free_sampling_embeddings": {"learnable": False},
        }
    ),
    **dict.fromkeys(("Kandinsky3Pipeline", "Kandinsky3Img2ImgPipeline"), Recipe(call={"negative_prompt": OMIT})),
    "ZImageOmniPipeline": left_out("runs in bfloat16 only, which it casts its pictures to, so rounding shows"),
    "Kandinsky6SRPipeline": Recipe(
        {"latent_upscaler": {"in_channels": 4, "stage_channels": (32, 32, 32)}},
        {"video": lambda _: video(5, 256), "resolution_scale": 2},
    ),
    "LTX2ImageToVideoPipeline": _ltx_2
    | Recipe({"vae": {"spatial_compression_ratio": 8, "temporal_compression_ratio": 4}}, {"image_crf": 0}),
}
