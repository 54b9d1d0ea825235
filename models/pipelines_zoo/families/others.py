"""Pipelines of their own kind."""

from __future__ import annotations

from typing import Any

import torch

from ..pictures import video
from ..recipe import OMIT, Part, Recipe, left_out
from ..tokenizers import LENGTH, VOCABULARY
from .videos import STRIDES, _ltx_2

_words: dict[str, Any] = {
    "prefix_length": LENGTH, "prefix_inner_dim": 24, "prefix_hidden_dim": 16, "vocab_size": VOCABULARY,
    "n_positions": 64, "n_embd": 24, "n_layer": 1, "n_head": 2,
}  # fmt: skip

#: of a chain of 24 tokens: two molecules, all of them to be designed
_molecules: dict[str, Any] = {
    "padding_mask": torch.ones(1, 24, dtype=torch.bool),
    "is_in_context_conditioning": torch.zeros(1, 24, dtype=torch.bool),
    "supports_local_latent": torch.ones(1, 24, dtype=torch.bool),
    "token_type": torch.arange(24)[None] % 3,
    "conditioning_features": {
        "condition_sequence_1_residue": torch.zeros(1, 24, dtype=torch.int64),
        "molecule_iid": torch.arange(24)[None] // 12,
        "molecule_entity_id": torch.arange(24)[None] // 12,
        "token_bond_path_length": (torch.arange(24)[:, None] - torch.arange(24)).abs().clamp(max=5)[None],
    },
}
_integrator: dict[str, Any] = {
    "schedule_mode": "log",
    "noise_mode": "1/t",
    "tsr_k": 2.0,
    "tsr_sigma": 0.3,
    "tail_steps": 0,
}

RECIPES: dict[str, Recipe] = {
    "RFD4ProteinaPipeline": Recipe(
        {
            "transformer": {"latent_dim": 4, "num_token_types": 3, "num_sequence_classes": 6},
            "bb_ca_scheduler": _integrator,
            "local_latents_scheduler": _integrator | {"schedule_mode": "power"},
            "recycle_depths": [1, 2],
        },
        _molecules | {"output_type": "np"},
    ),
    "UniDiffuserPipeline": Recipe(
        {"unet": {"num_text_tokens": LENGTH}, "text_encoder": 24, "image_encoder": 12, "text_decoder": _words},
        {"image": OMIT},
    ),
    "VQDiffusionPipeline": Recipe(
        {
            "transformer": Part("transformer_2d_vectorised", options={"sample_size": 32}),
            "vqvae": {"num_vq_embeddings": 11, "vq_embed_dim": 4, "lookup_from_codebook": False},
            "scheduler": {"num_vec_classes": 12},
            "learned_classifier_free_sampling_embeddings": {"learnable": True, "hidden_size": 24, "length": LENGTH},
        }
    ),
    **dict.fromkeys(
        ("Kandinsky3Pipeline", "Kandinsky3Img2ImgPipeline"),
        Recipe({"movq": Part("movq_decode")}, {"negative_prompt": OMIT}),
    ),
    **dict.fromkeys(
        ("BlipDiffusionPipeline", "BlipDiffusionControlNetPipeline"),
        left_out("needs transformers 4: its Q-Former calls `get_head_mask`, which transformers 5 does not have"),
    ),
    "ZImageOmniPipeline": left_out("runs in bfloat16 only, which it casts its pictures to, so rounding shows"),
    "Kandinsky6SRPipeline": Recipe(
        {
            "latent_upscaler": {"in_channels": 4, "stage_channels": (32, 32, 32)},
            "transformer": {"tile_sizes": ((64, 64),)},
        },
        {"video": lambda _: video(5, 48), "resolution_scale": 2},
    ),
    "LTX2ImageToVideoPipeline": _ltx_2 | Recipe({"vae": STRIDES}, {"image_crf": 0}),
}
