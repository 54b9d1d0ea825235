"""Cosmos, and Cosmos 3, which takes one packed sequence of text, video and sound."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import torch
from diffusers.utils import is_torchvision_available
from torch import nn

from ...case import Case
from ...inputs import Draw, Size
from .shapes import latent


def _cosmos(**options: Any) -> nn.Module:
    config: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "mlp_ratio": 2,
        "text_embed_dim": 24,
        "adaln_lora_dim": 8,
        "max_size": (4, 64, 32),
        "concat_padding_mask": is_torchvision_available(),
    }
    return diffusers.CosmosTransformer3DModel(**config | options)


def _cosmos_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": latent(module, size, draw),
        "timestep": draw.full(0.321, size.batch),
        "encoder_hidden_states": draw.normal(size.batch, size.tokens(512), module.config.text_embed_dim),
        "fps": 24,
        "padding_mask": draw.full(0, 1, 1, size.rows * 8, size.cols * 8),
    }


def _cosmos_conditioned(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """The first frame is given: `in_channels` includes its mask, and each frame has its own timestep."""
    inputs = _cosmos_inputs(module, size, draw)
    given = (torch.arange(size.frames) == 0).to(draw.device, draw.dtype)[None, None, :, None, None]
    inputs["hidden_states"] = inputs["hidden_states"][:, 1:]
    inputs["condition_mask"] = given.expand(size.batch, 1, size.frames, size.rows, size.cols)
    inputs["timestep"] = (0.321 * (1 - given)).expand(size.batch, -1, -1, -1, -1)
    if module.config.img_context_dim_in:
        picture = draw.normal(size.batch, module.config.img_context_num_tokens, module.config.img_context_dim_in)
        inputs["encoder_hidden_states"] = (
            draw.normal(size.batch, size.tokens(512), module.config.crossattn_proj_in_channels),
            picture,
        )
    return inputs


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


CASES: tuple[Case, ...] = (
    Case("cosmos", _cosmos, multiple=2, frames=3, maker=_cosmos_inputs),
    Case("cosmos2", partial(_cosmos, extra_pos_embed_type=None), multiple=2, frames=3, maker=_cosmos_conditioned),
    Case(
        "cosmos25",
        partial(
            _cosmos,
            use_crossattn_projection=True,
            crossattn_proj_in_channels=20,
            encoder_hidden_states_channels=24,
            img_context_dim_in=12,
            img_context_num_tokens=5,
            img_context_dim_out=32,
        ),
        multiple=2,
        frames=3,
        maker=_cosmos_conditioned,
    ),
    Case("cosmos3_omni", _cosmos3, multiple=2, frames=3, maker=_cosmos3_inputs),
    Case(
        "cosmos3_omni_sound",
        partial(_cosmos3, sound_gen=True, sound_dim=6),
        multiple=2,
        frames=3,
        maker=_cosmos3_inputs,
    ),
)

LEFT_OUT: dict[str, str] = {}
