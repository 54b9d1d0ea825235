"""Mochi."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

from ...case import Case
from ...inputs import Draw, Size
from .shapes import latent, text_inputs


def _mochi() -> nn.Module:
    return diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        pooled_projection_dim=20,
        in_channels=4,
        text_embed_dim=24,
        time_embed_dim=16,
        max_sequence_length=7,
    )


def _mochi_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    return {"hidden_states": latent(module, size, draw)} | text_inputs(module, size, draw)


CASES: tuple[Case, ...] = (Case("mochi", _mochi, multiple=2, frames=3, maker=_mochi_inputs),)

LEFT_OUT: dict[str, str] = {}
