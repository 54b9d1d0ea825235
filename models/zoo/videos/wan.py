"""Wan and its descendants (SkyReels, ChronoEdit, Helios, AnyFlow): one self- and one cross-attention per block."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import torch
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from torch import nn

from ...case import Case
from ...inputs import Draw, Size

_config: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 24,
    "freq_dim": 16,
    "ffn_dim": 48,
    "num_layers": 2,
}
_pictured: dict[str, Any] = {"image_dim": 12, "added_kv_proj_dim": 32}


def _basic(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """Video, timestep, text, and the embedding of the given image, if the model takes one."""
    config = module.config
    inputs: dict[str, Any] = {
        "hidden_states": draw.normal(size.batch, config.in_channels, size.frames, size.rows, size.cols),
        "timestep": draw.full(321.0, size.batch),
        "encoder_hidden_states": draw.normal(size.batch, size.tokens(512), config.text_dim),
    }
    if config.get("image_dim"):
        pictures = 1 if config.get("pos_embed_seq_len") is None else 2  # the first frame's, and the last one's
        inputs["encoder_hidden_states_image"] = draw.normal(pictures * size.batch, 5, config.image_dim)
    return inputs


def _frame_times(size: Size, draw: Draw) -> torch.Tensor:
    """`[B, F]` timesteps: the first frame is given, the others are noisy."""
    times = torch.full((size.batch, size.frames), 321.0)
    times[:, 0] = 0
    return times.to(draw.device, draw.dtype)


def _token_times(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """Each token has the timestep of its frame: `[B, F h w]`."""
    tokens = size.rows // 2 * (size.cols // 2)
    return _basic(module, size, draw) | {"timestep": _frame_times(size, draw).repeat_interleave(tokens, dim=1)}


def _wan(**options: Any) -> nn.Module:
    return diffusers.WanTransformer3DModel(**_config | options)


def _vace() -> nn.Module:
    config: dict[str, Any] = _config | {"num_layers": 3}
    return diffusers.WanVACETransformer3DModel(**config, vace_layers=[0, 2], vace_in_channels=6)


def _vace_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    control = draw.normal(size.batch, module.config.vace_in_channels, size.frames, size.rows, size.cols)
    return _basic(module, size, draw) | {
        "control_hidden_states": control,
        "control_hidden_states_scale": torch.tensor([1.0, 0.7]).to(draw.device, draw.dtype),
    }


def _animate() -> nn.Module:
    """A face of 16 pixels, four images per frame, each encoded alone; a pose for each frame but the first."""
    return diffusers.WanAnimateTransformer3DModel(
        **_config | {"in_channels": 12, "num_layers": 4},
        **_pictured,
        latent_channels=4,
        motion_encoder_channel_sizes={"4": 12, "8": 12, "16": 8},
        motion_encoder_size=16,
        motion_style_dim=12,
        motion_dim=4,
        motion_encoder_dim=12,
        face_encoder_hidden_dim=12,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
        motion_encoder_batch_size=3,
    )


def _animate_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    config, later = module.config, size.frames - 1
    face = config.motion_encoder_size
    return _basic(module, size, draw) | {
        "pose_hidden_states": draw.normal(size.batch, config.latent_channels, later, size.rows, size.cols),
        "face_pixel_values": draw.normal(size.batch, 3, 4 * later, face, face),
    }


def _skyreels(**options: Any) -> nn.Module:
    return diffusers.SkyReelsV2Transformer3DModel(**_config | options)


def _skyreels_forcing(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """Each frame has its own timestep."""
    inputs = _basic(module, size, draw) | {"timestep": _frame_times(size, draw), "enable_diffusion_forcing": True}
    return inputs | {"fps": draw.integers(2, 1)} if module.config.inject_sample_info else inputs


def _chrono_edit() -> nn.Module:
    return diffusers.ChronoEditTransformer3DModel(**_config, **_pictured)


def _helios() -> nn.Module:
    return diffusers.HeliosTransformer3DModel(**_config, rope_dim=(4, 6, 6), is_amplify_history=True)


def _helios_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """Past frames: recent ones at full, older ones at half, the oldest at a quarter of the resolution."""
    frames = {"long": 4, "mid": 2, "short": 2}
    places = torch.arange(sum(frames.values()) + size.frames)[None].to(draw.device)
    *history, now = places.split([*frames.values(), size.frames], dim=1)
    inputs = _basic(module, size, draw) | {"indices_hidden_states": now}
    for (age, count), indices in zip(frames.items(), history, strict=True):
        shape = (size.batch, module.config.in_channels, count, size.rows, size.cols)
        inputs |= {f"latents_history_{age}": draw.normal(*shape), f"indices_latents_history_{age}": indices}
    return inputs


def _anyflow() -> nn.Module:
    return diffusers.AnyFlowTransformer3DModel(**_config)


def _anyflow_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """A step from one timestep to another; frames come before channels."""
    inputs = _basic(module, size, draw)
    inputs["hidden_states"] = inputs["hidden_states"].transpose(1, 2).contiguous()
    times = _frame_times(size, draw)
    return inputs | {"timestep": times, "r_timestep": times / 2}


def _anyflow_far() -> nn.Module:
    return diffusers.AnyFlowFARTransformer3DModel(**_config, full_chunk_limit=2, chunk_partition=(1, 2, 3))


def _anyflow_far_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """The last chunk is denoised; the cache holds keys and values of the others, the first of them compressed."""
    config = module.config
    partition = list(config.chunk_partition)
    size = Size(size.rows, size.cols, size.batch, partition[-1], size.text)
    heads, width = config.num_attention_heads, config.attention_head_dim
    tokens, compressed = size.rows // 2 * (size.cols // 2), size.rows // 4 * (size.cols // 4)
    cache = {
        layer: {
            "full_cache": draw.normal(2, size.batch, heads, partition[1] * tokens, width),
            "compressed_cache": draw.normal(2, size.batch, heads, partition[0] * compressed, width),
        }
        for layer in range(config.num_layers)
    }
    return _anyflow_inputs(module, size, draw) | {
        "chunk_partition": partition,
        "kv_cache": cache,
        "kv_cache_flag": {"num_cached_chunks": len(partition) - 1, "is_cache_step": False},
    }


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
    """A pass over the driving video, which caches keys and values, or over the video, which also attends to them."""
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
    Case("wan_i2v", partial(_wan, **_pictured), multiple=2, frames=3, maker=_basic),
    Case("wan_flf2v", partial(_wan, **_pictured, pos_embed_seq_len=10), multiple=2, frames=3, maker=_basic),
    Case("wan_ti2v", _wan, multiple=2, frames=3, maker=_token_times),
    Case("wan_vace", _vace, multiple=2, frames=3, maker=_vace_inputs),
    Case("wan_animate", _animate, multiple=2, frames=3, maker=_animate_inputs),
    Case("skyreels_v2", partial(_skyreels, **_pictured), multiple=2, frames=4, maker=_basic),
    Case(
        "skyreels_v2_forcing",
        partial(_skyreels, inject_sample_info=True, num_frame_per_block=2),
        multiple=2,
        frames=4,
        maker=_skyreels_forcing,
    ),
    Case("chrono_edit", _chrono_edit, multiple=2, frames=3, maker=_basic),
    Case("helios", _helios, multiple=2, frames=3, maker=_helios_inputs),
    Case("anyflow", _anyflow, multiple=2, frames=3, maker=_anyflow_inputs),
    Case("anyflow_far", _anyflow_far, multiple=4, frames=3, maker=_anyflow_far_inputs),
    Case("wan_animate_2", _wan_animate_2, multiple=2, frames=3, maker=partial(_wan_animate_2_inputs, "extract")),
    Case("wan_animate_2_cached", _wan_animate_2, multiple=2, frames=3, maker=partial(_wan_animate_2_inputs, "cached")),
)

LEFT_OUT: dict[str, str] = {}
