"""Allegro."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro
from torch import nn

from ...case import Case
from ...inputs import Draw, Size
from .shapes import latent


def _allegro() -> nn.Module:
    return diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=2,
        cross_attention_dim=48,
        sample_height=32,
        sample_width=16,
        sample_frames=3,
        caption_channels=24,
    )


def _allegro_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    config = module.config
    rows, cols = size.rows // config.patch_size, size.cols // config.patch_size
    *freqs, grid_t, grid_h, grid_w = get_3d_rotary_pos_embed_allegro(  # pyright: ignore[reportAssignmentType]
        config.attention_head_dim,
        ((0, 0), (rows, cols)),
        (rows, cols),
        size.frames,
        (config.interpolation_scale_t, config.interpolation_scale_h, config.interpolation_scale_w),
        device=draw.device,
    )
    places = torch.cartesian_prod(grid_t.long(), grid_h.long(), grid_w.long()).T.reshape(3, 1, -1)
    return {
        "hidden_states": latent(module, size, draw),
        "encoder_hidden_states": draw.normal(size.batch, size.tokens(512), config.caption_channels),
        "timestep": draw.full(321, size.batch, dtype=torch.int64),
        "encoder_attention_mask": draw.mask(size.batch, size.tokens(512)),
        "image_rotary_emb": (tuple(freqs), tuple(places)),
    }


def _allegro_padded(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """The lower right quarter is masked out."""
    mask = torch.ones(size.batch, size.frames, size.rows, size.cols)
    mask[:, :, size.rows // 2 :, size.cols // 2 :] = 0
    return _allegro_inputs(module, size, draw) | {"attention_mask": mask.to(draw.device, draw.dtype)}


CASES: tuple[Case, ...] = (
    Case("allegro", _allegro, multiple=2, frames=3, maker=_allegro_inputs),
    Case("allegro_padded", _allegro, multiple=2, frames=3, maker=_allegro_padded),
)

LEFT_OUT: dict[str, str] = {}
