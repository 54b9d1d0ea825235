"""Inputs of audio denoisers: `rows` of the size is the length of the latent."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.models.embeddings import get_1d_rotary_pos_embed

from .draw import Draw, Maker, Size


def _stable_audio(transformer: diffusers.StableAudioDiTModel, size: Size, draw: Draw) -> dict[str, Any]:
    """Text tokens are followed by two for start and end; one global token precedes the latent."""
    config = transformer.config
    return {
        "hidden_states": draw.normal(size.batch, config.in_channels, size.rows),
        "timestep": draw.full(0.321, 1),
        "encoder_hidden_states": draw.normal(size.batch, size.tokens(128) + 2, config.cross_attention_input_dim),
        "global_hidden_states": draw.normal(size.batch, 1, config.global_states_input_dim),
        "rotary_embedding": get_1d_rotary_pos_embed(
            config.attention_head_dim // 2, size.rows + 1, use_real=True, repeat_interleave_real=False
        ),
    }


def _ace_step(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """The known audio is concatenated to the noise; text, lyrics and timbre are one sequence."""
    config = transformer.config
    channels = config.audio_acoustic_hidden_dim
    return {
        "hidden_states": draw.normal(size.batch, size.rows, channels),
        "timestep": draw.full(0.321, size.batch),
        "timestep_r": draw.full(0.2, size.batch),
        "encoder_hidden_states": draw.normal(
            size.batch, size.tokens(512), config.encoder_hidden_size or config.hidden_size
        ),
        "context_latents": draw.normal(size.batch, size.rows, config.in_channels - channels),
    }


MAKERS: dict[str, Maker] = {"AceStepTransformer1DModel": _ace_step, "StableAudioDiTModel": _stable_audio}
