"""CogVideoX 1.5, and ConsisID, which adds attention to a face."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import nn

from ...case import Case
from ...inputs import Draw, Size


def _cogvideox15() -> nn.Module:
    """A token spans two frames; half of the channels are the given image's."""
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=8,
        out_channels=4,
        time_embed_dim=8,
        ofs_embed_dim=8,
        text_embed_dim=24,
        num_layers=2,
        patch_size_t=2,
        max_text_seq_length=7,
        use_rotary_positional_embeddings=True,
        patch_bias=False,
    )


def _strength(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    return {"ofs": draw.full(2.0, 1)}


def _consis_id() -> nn.Module:
    """Every second block attends to a face, from two layers of its encoder."""
    return diffusers.ConsisIDTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=8,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=24,
        num_layers=4,
        max_text_seq_length=7,
        use_rotary_positional_embeddings=True,
        is_train_face=True,
        cross_attn_dim_head=8,
        cross_attn_num_heads=2,
        LFE_id_dim=12,
        LFE_vit_dim=16,
        LFE_depth=4,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=2,
        LFE_num_querie=3,
        LFE_output_dim=32,
        LFE_num_scale=2,
    )


def _consis_id_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    config = module.config
    grid = (size.rows // config.patch_size, size.cols // config.patch_size)
    vit = [draw.normal(size.batch, 5, config.LFE_vit_dim) for _ in range(config.LFE_num_scale)]
    return {
        "hidden_states": draw.normal(size.batch, size.frames, config.in_channels, size.rows, size.cols),
        "encoder_hidden_states": draw.normal(size.batch, size.tokens(226), config.text_embed_dim),
        "timestep": draw.full(321, size.batch, dtype=torch.int64),
        "image_rotary_emb": get_3d_rotary_pos_embed(
            config.attention_head_dim, ((0, 0), grid), grid, size.frames, device=draw.device
        ),
        "id_cond": draw.normal(size.batch, config.LFE_id_dim),
        "id_vit_hidden": vit,
    }


CASES: tuple[Case, ...] = (
    Case("cogvideox15_i2v", _cogvideox15, multiple=2, frames=4, extra=_strength),
    Case("consis_id", _consis_id, multiple=2, frames=2, maker=_consis_id_inputs),
)

LEFT_OUT: dict[str, str] = {}
