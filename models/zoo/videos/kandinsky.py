"""Kandinsky 5, 6 and the super-resolution model: video with channels last."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from ...case import Case
from ...inputs import Draw, Size


def _kandinsky5() -> nn.Module:
    return diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=24,
        in_text_dim2=20,
        time_dim=16,
        out_visual_dim=4,
        model_dim=32,
        ff_dim=48,
        num_text_blocks=2,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        visual_cond=True,
    )


def _channels_last(channels: int, size: Size, draw: Draw) -> Tensor:
    return draw.normal(size.batch, size.frames, size.rows, size.cols, channels)


def _kandinsky5_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """The given frames and a mask of them are channels of the video."""
    config, text = module.config, size.tokens(512)
    grid = (size.frames, size.rows // 2, size.cols // 2)
    return {
        "hidden_states": _channels_last(2 * config.in_visual_dim + 1, size, draw),
        "encoder_hidden_states": draw.normal(size.batch, text, config.in_text_dim),
        "timestep": draw.full(321.0, size.batch),
        "pooled_projections": draw.normal(size.batch, config.in_text_dim2),
        "visual_rope_pos": [torch.arange(n).to(draw.device) for n in grid],
        "text_rope_pos": torch.arange(text).to(draw.device),
        "scale_factor": (1.0, 2.0, 2.0),
    }


def _kandinsky6(**options: Any) -> nn.Module:
    config: dict[str, Any] = {
        "in_visual_dim": 4,
        "out_visual_dim": 4,
        "in_text_dim": 24,
        "in_text_dim2": 20,
        "time_dim": 16,
        "model_dim": 32,
        "ff_dim": 48,
        "num_text_blocks": 2,
        "num_visual_blocks": 2,
        "axes_dims": (4, 6, 6),
        "in_audio_dim": 8,
        "out_audio_dim": 8,
        "visual_token_type_num_embeddings": 2,
    }
    return diffusers.Kandinsky6Transformer3DModel(**config | options)


def _kandinsky6_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    config, text = module.config, size.tokens(512)
    return {
        "hidden_states": _channels_last(2 * config.in_visual_dim + 1, size, draw),
        "encoder_hidden_states": draw.normal(size.batch, text, config.in_text_dim),
        "pooled_projections": draw.normal(size.batch, config.in_text_dim2),
        "timestep": draw.full(321.0, size.batch),
        "audio_hidden_states": draw.normal(size.batch, 11, config.in_audio_dim),
        "encoder_attention_mask": draw.mask(size.batch, text, torch.bool),
        "visual_token_type_ids": draw.integers(2, size.batch, size.frames),
    }


def _kandinsky6_sr() -> nn.Module:
    return diffusers.Kandinsky6SRTransformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        time_dim=16,
        model_dim=32,
        ff_dim=48,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        nabla_window=(3, 3, 3),
    )


def _kandinsky6_sr_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": _channels_last(2 * module.config.in_visual_dim + 1, size, draw),
        "timestep": draw.full(321.0, size.batch),
    }


CASES: tuple[Case, ...] = (
    Case("kandinsky5", _kandinsky5, multiple=2, frames=3, maker=_kandinsky5_inputs),
    Case("kandinsky6", _kandinsky6, multiple=2, frames=3, maker=_kandinsky6_inputs),
    Case(
        "kandinsky6_gated",
        partial(_kandinsky6, ca_rope=True, cross_gates=True, text_token_padding=True),
        multiple=2,
        frames=3,
        maker=_kandinsky6_inputs,
    ),
    Case("kandinsky6_sr", _kandinsky6_sr, multiple=8, frames=2, maker=_kandinsky6_sr_inputs),
)

LEFT_OUT: dict[str, str] = {}
