"""Diffusion transformers of videos that take packed sequences, cameras, or what earlier calls have kept."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import torch
from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMRefinerKVCache
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from torch import Tensor, nn

from ..case import Case
from ..inputs import Draw, Size

# ----------------------------------------------------------------------------------------- packed sequences


def _cosmos3(**options: Any) -> nn.Module:
    config: dict[str, Any] = {
        "head_dim": 16,
        "hidden_size": 32,
        "intermediate_size": 48,
        "latent_channel": 4,
        "patch_latent_dim": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "vocab_size": 50,
        "rope_axes_dim": [4, 2, 2],
    }
    return diffusers.Cosmos3OmniTransformer(**config | options)


def _cosmos3_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """One sequence of the text and of each sample's video, whose first frame is given."""
    config, text = module.config, size.tokens(512)
    grid = (size.frames, size.rows // 2, size.cols // 2)
    frame = grid[1] * grid[2]
    places = torch.cartesian_prod(*(torch.arange(n) for n in grid)).T
    starts = [text + sample * size.frames * frame for sample in range(size.batch)]
    length = text + size.batch * size.frames * frame
    noisy = torch.cat([torch.arange(start + frame, start + size.frames * frame) for start in starts])
    shape = (1, config.latent_channel, size.frames, size.rows, size.cols)
    inputs = {
        "input_ids": draw.integers(config.vocab_size, text),
        "text_indexes": torch.arange(text),
        "position_ids": torch.cat([torch.arange(text).expand(3, -1), *[places + text] * size.batch], dim=1),
        "und_len": text,
        "sequence_length": length,
        "vision_tokens": [draw.normal(*shape) for _ in starts],
        "vision_token_shapes": [grid for _ in starts],
        "vision_sequence_indexes": torch.arange(text, length),
        "vision_mse_loss_indexes": noisy,
        "vision_timesteps": draw.full(321.0, len(noisy)),
        "vision_noisy_frame_indexes": [torch.arange(1, size.frames) for _ in starts],
    }
    if config.sound_gen:
        inputs |= {
            "sequence_length": length + 11,
            "position_ids": torch.cat([inputs["position_ids"], torch.arange(text, text + 11).expand(3, -1)], dim=1),
            "sound_tokens": [draw.normal(config.sound_dim, 11)],
            "sound_token_shapes": [(11, 1, 1)],
            "sound_sequence_indexes": torch.arange(length, length + 11),
            "sound_mse_loss_indexes": torch.arange(length, length + 11),
            "sound_timesteps": draw.full(321.0, 11),
            "sound_noisy_frame_indexes": [torch.arange(11)],
        }
    return inputs


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
    """One sequence of text, sound and video; the first frame is given, so that it has a time of its own."""
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


# -------------------------------------------------------------------------------------------------- cameras


def _sana_wm(**options: Any) -> nn.Module:
    """Linear attention with a state from frame to frame; every `softmax_every_n`-th block has softmax in its place.

    Softmax attention is computed in bfloat16 whatever the dtype of the model, so that an order of summation shows.
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
    """`[B, F, 20]`: poses of a camera that turns and moves, and its focal lengths and centre."""
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


# --------------------------------------------------------------------------------------------------- caches


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
    """The first block of frames: nothing is kept yet. Some tokens are given, so that each has a time of its own."""
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
    """Keys and values of one frame far back and one just before are kept."""
    config = module.config
    shape = (size.batch, size.rows * size.cols, config.num_attention_heads * config.attention_head_dim)
    cache = SanaWMRefinerKVCache(config.num_layers)
    for layer in range(config.num_layers):
        cache.get(layer).store_sink(draw.normal(*shape), draw.normal(*shape))
        cache.get(layer).store_history(draw.normal(*shape), draw.normal(*shape))
    cache.sink_pe = _rotary(module, size, [0], draw)
    return _sana_wm_refiner_inputs(module, size, draw) | {"kv_cache": cache, "kv_cache_mode": "inject"}


def _wan_animate_2() -> nn.Module:
    return diffusers.WanAnimate2Transformer3DModel(
        text_len=9,
        in_dim=8,
        dim=32,
        ffn_dim=48,
        freq_dim=16,
        text_dim=24,
        out_dim=4,
        num_heads=2,
        num_layers=2,
    )


def _wan_animate_2_inputs(mode: str, module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """A pass over the driving video, which keeps keys and values, or one over the video, which attends to them too."""
    config = module.config
    grid = torch.tensor([[size.frames, size.rows // 2, size.cols // 2]] * size.batch)
    tokens = int(grid[0].prod())
    shape = (config.in_dim // 2, size.frames, size.rows, size.cols)
    cache = WanAnimate2KVCache(config.num_layers)
    inputs: dict[str, Any] = {
        "hidden_states": [draw.normal(*shape) for _ in range(size.batch)],
        "timestep": draw.full(321.0, size.batch),
        "encoder_hidden_states": [draw.normal(size.tokens(512), config.text_dim) for _ in range(size.batch)],
        "condition_latents": [draw.normal(*shape) for _ in range(size.batch)],
        "encoder_hidden_states_image": draw.normal(size.batch, 5, 1280),
        "kv_cache": cache,
        "kv_cache_mode": mode,
        "seq_len": tokens,
    }
    if mode == "extract":
        return inputs | {"offset_grid_sizes": grid}
    for layer in range(config.num_layers):
        kept = (size.batch, tokens, config.num_heads, config.dim // config.num_heads)
        cache.get(layer).store(draw.normal(*kept), draw.normal(*kept))
    area = [size.rows * 8, size.cols * 8]
    return inputs | {"reference_grid_sizes": grid, "origin_len": 4 * (size.frames - 1), "origin_area": area}


CASES: tuple[Case, ...] = (
    Case("cosmos3_omni", _cosmos3, multiple=2, frames=3, maker=_cosmos3_inputs),
    Case(
        "cosmos3_omni_sound",
        partial(_cosmos3, sound_gen=True, sound_dim=6),
        multiple=2,
        frames=3,
        maker=_cosmos3_inputs,
    ),
    Case("minimax_h3", _minimax_h3, multiple=2, frames=3, maker=_minimax_h3_inputs),
    Case("sana_wm", partial(_sana_wm, softmax_every_n=0), frames=3, maker=_sana_wm_inputs),
    Case("sana_wm_softmax", partial(_sana_wm, softmax_every_n=2), frames=3, maker=_sana_wm_inputs),
    Case("sana_wm_refiner", _sana_wm_refiner, frames=2, maker=_sana_wm_refiner_inputs),
    Case("sana_wm_refiner_cached", _sana_wm_refiner, frames=2, maker=_sana_wm_refiner_cached),
    Case("wan_animate_2", _wan_animate_2, multiple=2, frames=3, maker=partial(_wan_animate_2_inputs, "extract")),
    Case("wan_animate_2_cached", _wan_animate_2, multiple=2, frames=3, maker=partial(_wan_animate_2_inputs, "cached")),
)

LEFT_OUT: dict[str, str] = {}
