"""Denoisers of audio and other one-dim signals: `rows` is the length."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusers.models.transformers.t5_film_transformer import T5FilmDecoder
from torch import nn

from ..case import Case
from ..inputs import Draw, Size


def _padded(size: Size, draw: Draw) -> torch.Tensor:
    """`[B, L]`: each sample but the first is shorter than the one before."""
    lengths = size.rows - 3 * torch.arange(size.batch)
    return (torch.arange(size.rows)[None] < lengths[:, None]).to(draw.device)


def _stable_audio() -> nn.Module:
    return diffusers.StableAudioDiTModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        cross_attention_dim=24,
        time_proj_dim=16,
        global_states_input_dim=20,
        cross_attention_input_dim=12,
    )


def _stable_audio_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """One token of global conditions precedes the audio."""
    config = module.config
    rotary = get_1d_rotary_pos_embed(
        config.attention_head_dim // 2, size.rows + 1, use_real=True, repeat_interleave_real=False
    )
    return {
        "hidden_states": draw.normal(size.batch, config.in_channels, size.rows),
        "timestep": draw.full(0.321, 1),
        "encoder_hidden_states": draw.normal(size.batch, size.tokens(130), config.cross_attention_input_dim),
        "global_hidden_states": draw.normal(size.batch, 1, config.global_states_input_dim),
        "rotary_embedding": tuple(part.to(draw.device) for part in rotary),
    }


def _stable_audio_padded(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    return _stable_audio_inputs(module, size, draw) | {"attention_mask": _padded(size, draw)}


def _stable_audio_3(**options: Any) -> nn.Module:
    return diffusers.StableAudio3DiTModel(
        io_channels=4,
        embed_dim=32,
        depth=2,
        num_heads=2,
        cond_token_dim=12,
        global_cond_dim=20,
        local_add_cond_dim=5,
        timestep_features_dim=16,
        num_memory_tokens=3,
        **options,
    )


def _stable_audio_3_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    config = module.config
    inputs = {
        "hidden_states": draw.normal(size.batch, config.io_channels, size.rows),
        "timestep": draw.full(0.321, size.batch),
        "encoder_hidden_states": draw.normal(size.batch, size.tokens(257), config.cond_token_dim),
        "global_hidden_states": draw.normal(size.batch, config.global_cond_dim),
        "encoder_attention_mask": draw.mask(size.batch, size.tokens(257), torch.bool),
    }
    if config.patch_size == 1:
        inputs["local_add_cond"] = draw.normal(size.batch, config.local_add_cond_dim, size.rows)
    return inputs


def _ace_step() -> nn.Module:
    return diffusers.AceStepTransformer1DModel(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        in_channels=12,
        audio_acoustic_hidden_dim=4,
        sliding_window=3,
        encoder_hidden_size=24,
    )


def _longcat_audio(**options: Any) -> nn.Module:
    config: dict[str, Any] = {"dit_dim": 32, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": 24, "latent_dim": 8}
    return diffusers.LongCatAudioDiTTransformer(**config, **options)


def _longcat_audio_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    config = module.config
    return {
        "hidden_states": draw.normal(size.batch, size.rows, config.latent_dim),
        "encoder_hidden_states": draw.normal(size.batch, size.tokens(64), config.dit_text_dim),
        "encoder_attention_mask": draw.mask(size.batch, size.tokens(64), torch.bool),
        "timestep": draw.full(0.321, size.batch),
        "attention_mask": _padded(size, draw),
        "latent_cond": draw.normal(size.batch, size.rows, config.latent_dim),
    }


def _minimax_music() -> nn.Module:
    return diffusers.MiniMaxMusic3Transformer1DModel(
        in_channels=4,
        condition_dim=12,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        ff_inner_dim=48,
        rotary_dim=8,
        fourier_embedding_dim=16,
    )


def _minimax_music_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.normal(size.batch, module.config.in_channels, size.rows),
        "timestep": draw.full(0.321, size.batch),
        "encoder_hidden_states": draw.normal(size.batch, size.rows, module.config.condition_dim),
    }


def _depth_decoder() -> nn.Module:
    return diffusers.MiniMaxMusic3RVQDepthDecoder(
        hidden_size=32,
        num_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        audio_vocab_size=10,
        num_codebooks=3,
        max_position_embeddings=64,
    )


def _depth_decoder_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    return {"inputs_embeds": draw.normal(size.batch, size.rows, module.config.hidden_size)}


def _t5_film() -> nn.Module:
    return T5FilmDecoder(input_dims=8, targets_length=64, d_model=32, num_layers=2, num_heads=2, d_kv=16, d_ff=48)


def _t5_film_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """Notes and the preceding audio are both encoded, and both padded."""
    width = module.config.d_model
    return {
        "encodings_and_masks": [
            (draw.normal(size.batch, length, width), draw.mask(size.batch, length)) for length in (size.tokens(64), 9)
        ],
        "decoder_input_tokens": draw.normal(size.batch, size.rows, module.config.input_dims),
        "decoder_noise_time": draw.full(0.321, size.batch),
    }


CASES: tuple[Case, ...] = (
    Case("stable_audio", _stable_audio, maker=_stable_audio_inputs),
    Case("stable_audio_padded", _stable_audio, maker=_stable_audio_padded),
    Case("stable_audio_3", _stable_audio_3, maker=_stable_audio_3_inputs),
    Case(
        "stable_audio_3_patches",
        partial(_stable_audio_3, patch_size=2, use_differential_attention=False),
        multiple=2,
        maker=_stable_audio_3_inputs,
    ),
    Case("ace_step", _ace_step),
    Case("longcat_audio", _longcat_audio, maker=_longcat_audio_inputs),
    Case("longcat_audio_local", partial(_longcat_audio, adaln_type="local"), maker=_longcat_audio_inputs),
    Case("minimax_music3", _minimax_music, maker=_minimax_music_inputs),
    Case("minimax_music3_depth", _depth_decoder, text=None, maker=_depth_decoder_inputs),
    Case("t5_film_decoder", _t5_film, maker=_t5_film_inputs),
)

LEFT_OUT: dict[str, str] = {}
