"""Motif Video."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
from torch import nn

from ...case import Case
from ...inputs import Draw, Size
from .shapes import latent


def _motif(**options: Any) -> nn.Module:
    config: dict[str, Any] = {
        "in_channels": 9,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_single_layers": 4,
        "num_decoder_layers": 2,
        "text_embed_dim": 24,
        "image_embed_dim": 12,
        "rope_axes_dim": (4, 6, 6),
    }
    return diffusers.MotifVideoTransformer3DModel(**config | options)


def _motif_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    config, text = module.config, size.tokens(512)
    return {
        "hidden_states": latent(module, size, draw),
        "timestep": draw.full(321.0, size.batch),
        "encoder_hidden_states": draw.normal(size.batch, text, config.text_embed_dim),
        "encoder_attention_mask": draw.mask(size.batch, text),
        "image_embeds": draw.normal(size.batch, 5, config.image_embed_dim),
    }


CASES: tuple[Case, ...] = (
    Case("motif_video", _motif, multiple=2, frames=3, maker=_motif_inputs),
    Case(
        "motif_video_crossed",
        partial(_motif, enable_text_cross_attention_dual=True, enable_text_cross_attention_single=True),
        multiple=2,
        frames=3,
        maker=_motif_inputs,
    ),
)

LEFT_OUT: dict[str, str] = {}
