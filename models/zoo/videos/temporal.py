"""The temporal transformer of diffusers: attention over frames alone."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

from ...case import Case
from ...inputs import Draw, Size


def _temporal() -> nn.Module:
    return diffusers.models.transformers.TransformerTemporalModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=16,
        num_layers=2,
        norm_num_groups=4,
        positional_embeddings="sinusoidal",
        num_positional_embeddings=8,
    )


def _temporal_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    shape = (size.batch * size.frames, module.config.in_channels, size.rows, size.cols)
    return {"hidden_states": draw.normal(*shape), "num_frames": size.frames}


CASES: tuple[Case, ...] = (Case("transformer_temporal", _temporal, frames=3, text=None, maker=_temporal_inputs),)

LEFT_OUT: dict[str, str] = {}
