"""Sana Video, and Sana WM, which takes camera poses and whose refiner caches keys and values between calls."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import torch
from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMRefinerKVCache
from torch import Tensor, nn

from ...case import Case
from ...inputs import Draw, Size
from .shapes import latent


def _sana_video() -> nn.Module:
    return diffusers.SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=24,
    )


def _sana_video_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    text = size.tokens(300)
    return {
        "hidden_states": latent(module, size, draw),
        "encoder_hidden_states": draw.normal(size.batch, text, module.config.caption_channels),
        "timestep": draw.full(321.0, size.batch),
        "encoder_attention_mask": draw.mask(size.batch, text),
    }


def _sana_wm(**options: Any) -> nn.Module:
    """Linear attention with a state from frame to frame; every `softmax_every_n`-th block has softmax attention.

    Softmax attention runs in bfloat16 in any dtype of the model, so the order of summation is visible.
    """
    return diffusers.SanaWMTransformer3DModel(
        in_channels=4,
        num_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        linear_head_dim=16,
        chunk_plucker_channels=6,
        chunk_plucker_post_attn_blocks=1,
        caption_channels=24,
        mlp_ratio=2.0,
        **options,
    )


def _cameras(size: Size, draw: Draw) -> Tensor:
    """`[B, F, 20]`: poses of a camera that rotates and moves, focal lengths and centre."""
    angle = 0.1 * torch.arange(size.frames) + 0.05
    pose = torch.eye(4).repeat(size.frames, 1, 1)
    pose[:, 0, 0] = pose[:, 2, 2] = angle.cos()
    pose[:, 0, 2], pose[:, 2, 0] = angle.sin(), -angle.sin()
    pose[:, 0, 3] = angle
    lens = torch.tensor([size.cols, size.rows, size.cols / 2, size.rows / 2]).expand(size.frames, 4)
    return torch.cat([pose.flatten(1), lens], dim=1).repeat(size.batch, 1, 1).to(draw.device, draw.dtype)


def _sana_wm_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    config, text = module.config, size.tokens(300)
    times = torch.full((size.batch, 1, size.frames), 321.0)
    times[..., 0] = 0
    shape = (size.frames, size.rows, size.cols)
    return {
        "hidden_states": draw.normal(size.batch, config.in_channels, *shape),
        "timestep": times.to(draw.device, draw.dtype),
        "encoder_hidden_states": draw.normal(size.batch, 1, text, config.caption_channels),
        "encoder_attention_mask": draw.mask(size.batch, text),
        "camera_conditions": _cameras(size, draw),
        "chunk_plucker": draw.normal(size.batch, config.chunk_plucker_channels, *shape),
    }


def _sana_wm_refiner() -> nn.Module:
    return diffusers.SanaWMLTX2RefinerTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=2,
        caption_channels=24,
    )


def _sana_wm_refiner_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """The first block of frames: the cache is empty. Some tokens are given, so each token has its own timestep."""
    config, text = module.config, size.tokens(1024)
    tokens = size.frames * size.rows * size.cols
    positions = list(range(2, 2 + size.frames))
    times = torch.where(torch.arange(tokens) < size.rows * size.cols, 0.0, 321.0)
    return {
        "hidden_states": draw.normal(size.batch, tokens, config.in_channels),
        "encoder_hidden_states": draw.normal(size.batch, text, config.caption_channels),
        "timestep": times.repeat(size.batch, 1).to(draw.device, draw.dtype),
        "video_rotary_emb": _rotary(module, size, positions, draw),
        "encoder_attention_mask": draw.mask(size.batch, text),
    }


def _rotary(module: Any, size: Size, positions: list[int], draw: Draw) -> tuple[Tensor, Tensor]:
    return module.build_rotary_emb_for_absolute_positions(
        batch_size=size.batch,
        frame_positions=positions,
        height=size.rows,
        width=size.cols,
        fps=16.0,
        device=draw.device,
    )


def _sana_wm_refiner_cached(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """The cache holds keys and values of one early frame and of the previous one."""
    config = module.config
    shape = (size.batch, size.rows * size.cols, config.num_attention_heads * config.attention_head_dim)
    cache = SanaWMRefinerKVCache(config.num_layers)
    for layer in range(config.num_layers):
        cache.get(layer).store_sink(draw.normal(*shape), draw.normal(*shape))
        cache.get(layer).store_history(draw.normal(*shape), draw.normal(*shape))
    cache.sink_pe = _rotary(module, size, [0], draw)
    return _sana_wm_refiner_inputs(module, size, draw) | {"kv_cache": cache, "kv_cache_mode": "inject"}


CASES: tuple[Case, ...] = (
    Case("sana_video", _sana_video, multiple=2, frames=3, maker=_sana_video_inputs),
    Case("sana_wm", partial(_sana_wm, softmax_every_n=0), frames=3, maker=_sana_wm_inputs),
    Case("sana_wm_softmax", partial(_sana_wm, softmax_every_n=2), frames=3, maker=_sana_wm_inputs),
    Case("sana_wm_refiner", _sana_wm_refiner, frames=2, maker=_sana_wm_refiner_inputs),
    Case("sana_wm_refiner_cached", _sana_wm_refiner, frames=2, maker=_sana_wm_refiner_cached),
)

LEFT_OUT: dict[str, str] = {}
