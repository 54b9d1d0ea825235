"""EasyAnimate."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

from ...case import Case
from ...inputs import Draw, Size


def _easy_animate(**options: Any) -> nn.Module:
    """The given frames and a mask of them are further channels; the last block has one stream for text and video."""
    return diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=9,
        out_channels=4,
        patch_size=2,
        num_layers=3,
        mmdit_layers=2,
        time_embed_dim=16,
        text_embed_dim=24,
        text_embed_dim_t5=12,
        **options,
    )


def _easy_animate_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    config = module.config
    shape = (size.frames, size.rows, size.cols)
    return {
        "hidden_states": draw.normal(size.batch, config.out_channels, *shape),
        "timestep": draw.full(321.0, size.batch),
        "encoder_hidden_states": draw.normal(size.batch, size.tokens(1024), config.text_embed_dim),
        "encoder_hidden_states_t5": draw.normal(size.batch, 5, config.text_embed_dim_t5),
        "inpaint_latents": draw.normal(size.batch, config.in_channels - config.out_channels, *shape),
    }


CASES: tuple[Case, ...] = (Case("easy_animate", _easy_animate, multiple=2, frames=3, maker=_easy_animate_inputs),)

LEFT_OUT: dict[str, str] = {}
