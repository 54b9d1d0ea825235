"""Latte."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from ...case import Case
from ...inputs import Draw, Size
from .shapes import latent


def _latte() -> nn.Module:
    return diffusers.LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        attention_bias=True,
        sample_size=16,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=24,
        video_length=3,
    )


def _latte_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": latent(module, size, draw),
        "timestep": draw.full(321, size.batch, dtype=torch.int64),
        "encoder_hidden_states": draw.normal(size.batch, size.tokens(120), module.config.caption_channels),
    }


CASES: tuple[Case, ...] = (Case("latte", _latte, multiple=2, frames=3, maker=_latte_inputs),)

LEFT_OUT: dict[str, str] = {}
