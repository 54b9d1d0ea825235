"""Hunyuan Video, its version 1.5 and FramePack, which attends to past frames."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import torch
from torch import nn

from ...case import Case
from ...inputs import Draw, Size
from .shapes import latent, text_inputs

_hunyuan_config: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 2,
    "text_embed_dim": 24,
    "pooled_projection_dim": 20,
    "rope_axes_dim": (4, 6, 6),
}


def _hunyuan(**options: Any) -> nn.Module:
    return diffusers.HunyuanVideoTransformer3DModel(**_hunyuan_config | options)


def _hunyuan_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    inputs = {"hidden_states": latent(module, size, draw)} | text_inputs(module, size, draw)
    inputs["pooled_projections"] = draw.normal(size.batch, module.config.pooled_projection_dim)
    if module.config.guidance_embeds:
        inputs["guidance"] = draw.full(6016.0, size.batch)
    return inputs


def _hunyuan15() -> nn.Module:
    return diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=24,
        text_embed_2_dim=12,
        image_embed_dim=20,
        rope_axes_dim=(4, 6, 6),
        use_meanflow=True,
    )


def _hunyuan15_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """Two texts, both padded, and an image."""
    config, text = module.config, size.tokens(1000)
    return {
        "hidden_states": latent(module, size, draw),
        "timestep": draw.full(321.0, size.batch),
        "timestep_r": draw.full(300.0, size.batch),
        "encoder_hidden_states": draw.normal(size.batch, text, config.text_embed_dim),
        "encoder_attention_mask": draw.mask(size.batch, text),
        "encoder_hidden_states_2": draw.normal(size.batch, 5, config.text_embed_2_dim),
        "encoder_attention_mask_2": draw.mask(size.batch, 5),
        "image_embeds": draw.normal(size.batch, 6, config.image_embed_dim),
    }


def _hunyuan15_textual(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """No image: its embedding is zero."""
    inputs = _hunyuan15_inputs(module, size, draw)
    return inputs | {"image_embeds": torch.zeros_like(inputs["image_embeds"])}


def _framepack() -> nn.Module:
    return diffusers.HunyuanVideoFramepackTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=24,
        pooled_projection_dim=20,
        rope_axes_dim=(4, 6, 6),
        image_condition_type=None,
        has_image_proj=True,
        image_proj_dim=12,
        has_clean_x_embedder=True,
    )


def _framepack_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """Past frames: recent ones at full, older ones at half, the oldest at a quarter of the resolution."""
    config, text = module.config, size.tokens(512)
    frames = {"history_4x": 4, "history_2x": 2, "clean": 2}
    places = torch.arange(sum(frames.values()) + size.frames).to(draw.device)
    *history, now = places.split([*frames.values(), size.frames])
    inputs: dict[str, Any] = {
        "hidden_states": latent(module, size, draw),
        "timestep": draw.full(321.0, size.batch),
        "encoder_hidden_states": draw.normal(size.batch, text, config.text_embed_dim),
        "encoder_attention_mask": draw.mask(size.batch, text),
        "pooled_projections": draw.normal(size.batch, config.pooled_projection_dim),
        "image_embeds": draw.normal(size.batch, 5, config.image_proj_dim),
        "indices_latents": now,
        "guidance": draw.full(6016.0, size.batch),
    }
    for (age, count), indices in zip(frames.items(), history, strict=True):
        inputs[f"latents_{age}"] = draw.normal(size.batch, config.in_channels, count, size.rows, size.cols)
        inputs[f"indices_latents_{age}"] = indices
    return inputs


CASES: tuple[Case, ...] = (
    Case("hunyuan_video", _hunyuan, multiple=2, frames=3, maker=_hunyuan_inputs),
    Case(
        "hunyuan_video_replace",
        partial(_hunyuan, image_condition_type="token_replace", guidance_embeds=False),
        multiple=2,
        frames=3,
        maker=_hunyuan_inputs,
    ),
    Case("hunyuan_video15", _hunyuan15, frames=3, maker=_hunyuan15_inputs),
    Case("hunyuan_video15_textual", _hunyuan15, frames=3, maker=_hunyuan15_textual),
    Case("hunyuan_video_framepack", _framepack, multiple=2, frames=3, maker=_framepack_inputs),
)

LEFT_OUT: dict[str, str] = {}
