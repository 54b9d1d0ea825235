"""MiniMax H3, which takes one packed sequence of text, sound and video."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from ...case import Case
from ...inputs import Draw, Size


def _minimax_h3() -> nn.Module:
    return diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        ffn_dim=48,
        in_channels=4,
        audio_in_channels=6,
        text_dim=24,
        freq_dim=16,
        time_embed_hidden_dim=32,
        time_embed_dim=16,
        rope_freq_dim=2,
    )


def _minimax_h3_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """One sequence of text, sound and video; the first frame is given and has its own timestep."""
    config, text, audio = module.config, size.tokens(512), 11
    grid = (size.frames, size.rows // 2, size.cols // 2)
    video = grid[0] * grid[1] * grid[2]
    indices = torch.arange(text + audio + video).split([text, audio, video])
    line = torch.arange(text + audio, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.0, 0.0])
    places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid))
    given = indices[2] < text + audio + grid[1] * grid[2]
    times = [torch.zeros(text + audio, dtype=torch.int64), given.long()]
    tags = [torch.full((len(part),), tag) for tag, part in enumerate(indices)]
    return {
        "hidden_states": draw.normal(size.batch, video, config.in_channels * 4),
        "audio_hidden_states": draw.normal(size.batch, audio, config.audio_in_channels),
        "encoder_hidden_states": draw.normal(size.batch, text, config.text_dim),
        "timestep": torch.tensor([321.0, 0.0]).to(draw.device, draw.dtype),
        "timestep_indices": torch.cat(times).to(draw.device),
        "token_tags": torch.cat(tags).to(draw.device),
        "position_ids": torch.cat([line, places]).to(draw.device),
        "text_indices": indices[0].to(draw.device),
        "audio_indices": indices[1].to(draw.device),
        "video_indices": indices[2].to(draw.device),
    }


CASES: tuple[Case, ...] = (Case("minimax_h3", _minimax_h3, multiple=2, frames=3, maker=_minimax_h3_inputs),)

LEFT_OUT: dict[str, str] = {}
