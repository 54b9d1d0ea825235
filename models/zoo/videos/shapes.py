"""Inputs that several families of video transformers share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...inputs import Draw, Size


def latent(module: Any, size: Size, draw: Draw) -> Tensor:
    return draw.normal(size.batch, module.config.in_channels, size.frames, size.rows, size.cols)


def text_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """A timestep, text of `config.text_embed_dim` channels, and the mask of its padding."""
    return {
        "timestep": draw.full(321.0, size.batch),
        "encoder_hidden_states": draw.normal(size.batch, size.tokens(7), module.config.text_embed_dim),
        "encoder_attention_mask": draw.mask(size.batch, size.tokens(7)),
    }
