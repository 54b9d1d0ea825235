"""LTX Video, and LTX-2, which also generates audio."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import torch
from torch import nn

from ...case import Case
from ...inputs import Draw, Size


def _ltx() -> nn.Module:
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=24,
    )


def _ltx_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """Each latent pixel is a token."""
    return {
        "hidden_states": draw.normal(size.batch, size.frames * size.rows * size.cols, module.config.in_channels),
        "encoder_hidden_states": draw.normal(size.batch, size.tokens(128), module.config.caption_channels),
        "timestep": draw.full(321.0, size.batch),
        "encoder_attention_mask": draw.mask(size.batch, size.tokens(128)),
        "num_frames": size.frames,
        "height": size.rows,
        "width": size.cols,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def _ltx_conditioned(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """Some tokens belong to a given image: each token has its own position and timestep."""
    inputs = _ltx_inputs(module, size, draw)
    for name in ("num_frames", "height", "width", "rope_interpolation_scale"):
        del inputs[name]
    places = torch.cartesian_prod(*(torch.arange(n).float() for n in (size.frames, size.rows, size.cols)))
    inputs["video_coords"] = (places * torch.tensor([8 / 25, 32, 32])).T.repeat(size.batch, 1, 1).to(draw.device)
    given = torch.arange(len(places)) < size.rows * size.cols
    inputs["timestep"] = torch.where(given, 0.0, 321.0).repeat(size.batch, 1).to(draw.device, draw.dtype)
    return inputs


def _ltx2(**options: Any) -> nn.Module:
    config: dict[str, Any] = {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "audio_in_channels": 4,
        "audio_out_channels": 4,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16,
        "num_layers": 2,
        "caption_channels": 24,
    }
    return diffusers.LTX2VideoTransformer3DModel(**config | options)


def _ltx2_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """Each latent pixel is a token, and so is each piece of audio."""
    config, text = module.config, size.tokens(1024)
    inputs = {
        "hidden_states": draw.normal(size.batch, size.frames * size.rows * size.cols, config.in_channels),
        "audio_hidden_states": draw.normal(size.batch, 11, config.audio_in_channels),
        "encoder_hidden_states": draw.normal(size.batch, text, config.caption_channels),
        "audio_encoder_hidden_states": draw.normal(size.batch, text, config.caption_channels),
        "timestep": draw.full(321.0, size.batch),
        "encoder_attention_mask": draw.mask(size.batch, text),
        "audio_encoder_attention_mask": draw.mask(size.batch, text),
        "num_frames": size.frames,
        "height": size.rows,
        "width": size.cols,
        "fps": 25.0,
        "audio_num_frames": 11,
    }
    return inputs | {"sigma": draw.full(321.0, size.batch)} if config.cross_attn_mod else inputs


CASES: tuple[Case, ...] = (
    Case("ltx_video", _ltx, frames=2, maker=_ltx_inputs),
    Case("ltx_video_conditioned", _ltx, frames=2, maker=_ltx_conditioned),
    Case("ltx2_video", _ltx2, frames=2, maker=_ltx2_inputs),
    Case(
        "ltx2_video_gated",
        partial(
            _ltx2,
            gated_attn=True,
            cross_attn_mod=True,
            audio_gated_attn=True,
            audio_cross_attn_mod=True,
            rope_type="split",
        ),
        frames=2,
        maker=_ltx2_inputs,
    ),
)

LEFT_OUT: dict[str, str] = {}
