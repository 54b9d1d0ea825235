"""Inputs of image transformers."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from torch import Tensor

from ..draw import Draw, Maker, Size


def _image(transformer: Any, size: Size, draw: Draw) -> Tensor:
    return draw.normal(size.batch, transformer.config.in_channels, size.rows, size.cols)


def _dit(transformer: diffusers.DiTTransformer2DModel, size: Size, draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": _image(transformer, size, draw),
        "timestep": draw.full(321, size.batch, dtype=torch.int64),
        "class_labels": draw.integers(transformer.config.num_embeds_ada_norm, size.batch),
    }


def _pixart(transformer: diffusers.PixArtTransformer2DModel, size: Size, draw: Draw) -> dict[str, Any]:
    text = size.tokens(300)
    added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if transformer.use_additional_conditions:
        pixels = torch.tensor([8.0 * size.rows, 8.0 * size.cols]).to(draw.device, draw.dtype)
        added = {
            "resolution": pixels.repeat(size.batch, 1),
            "aspect_ratio": draw.full(size.rows / size.cols, size.batch, 1),
        }
    return {
        "hidden_states": _image(transformer, size, draw),
        "encoder_hidden_states": draw.normal(size.batch, text, transformer.config.caption_channels),
        "encoder_attention_mask": draw.mask(size.batch, text),
        "timestep": draw.full(321, size.batch, dtype=torch.int64),
        "added_cond_kwargs": added,
    }


def _sd3(transformer: diffusers.SD3Transformer2DModel, size: Size, draw: Draw) -> dict[str, Any]:
    config = transformer.config
    return {
        "hidden_states": _image(transformer, size, draw),
        "timestep": draw.full(321.0, size.batch),
        "encoder_hidden_states": draw.normal(size.batch, size.tokens(77 + 256), config.joint_attention_dim),
        "pooled_projections": draw.normal(size.batch, config.pooled_projection_dim),
    }


def _flux(transformer: diffusers.FluxTransformer2DModel, size: Size, draw: Draw) -> dict[str, Any]:
    """The latent is packed: 2 x 2 pixels of it are one token."""
    config = transformer.config
    rows, cols, text = size.rows // 2, size.cols // 2, size.tokens(512)
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(rows).float(), torch.arange(cols).float())
    inputs: dict[str, Any] = {
        "hidden_states": draw.normal(size.batch, rows * cols, config.in_channels),
        "encoder_hidden_states": draw.normal(size.batch, text, config.joint_attention_dim),
        "pooled_projections": draw.normal(size.batch, config.pooled_projection_dim),
        "timestep": draw.full(0.321, size.batch),
        "img_ids": places.to(draw.device, draw.dtype),
        "txt_ids": draw.full(0, text, 3),
    }
    if config.guidance_embeds:
        inputs["guidance"] = draw.full(3.5, size.batch, dtype=torch.float32)
    return inputs


def _hunyuan_dit(transformer: diffusers.HunyuanDiT2DModel, size: Size, draw: Draw) -> dict[str, Any]:
    config = transformer.config
    rows, cols = size.rows // config.patch_size, size.cols // config.patch_size
    rotary = get_2d_rotary_pos_embed(
        config.attention_head_dim, ((0, 0), (rows, cols)), (rows, cols), device=draw.device, output_type="pt"
    )
    inputs: dict[str, Any] = {
        "hidden_states": _image(transformer, size, draw),
        "timestep": draw.full(321.0, size.batch),
        "encoder_hidden_states": draw.normal(size.batch, config.text_len, config.cross_attention_dim),
        "text_embedding_mask": draw.mask(size.batch, config.text_len, torch.int64),
        "encoder_hidden_states_t5": draw.normal(size.batch, config.text_len_t5, config.cross_attention_dim_t5),
        "text_embedding_mask_t5": draw.mask(size.batch, config.text_len_t5, torch.int64),
        "image_rotary_emb": rotary,
    }
    if config.use_style_cond_and_image_meta_size:
        height, width = size.rows * 8, size.cols * 8
        meta = torch.tensor([height, width, height, width, 0, 0]).to(draw.device, draw.dtype)
        inputs["image_meta_size"] = meta.repeat(size.batch, 1)
        inputs["style"] = draw.full(0, size.batch, dtype=torch.int64)
    return inputs


def _sana(transformer: diffusers.SanaTransformer2DModel, size: Size, draw: Draw) -> dict[str, Any]:
    text = size.tokens(300)
    inputs: dict[str, Any] = {
        "hidden_states": _image(transformer, size, draw),
        "encoder_hidden_states": draw.normal(size.batch, text, transformer.config.caption_channels),
        "encoder_attention_mask": draw.mask(size.batch, text, torch.int64),
        "timestep": draw.full(321.0, size.batch),
    }
    if transformer.config.guidance_embeds:
        inputs["guidance"] = draw.full(0.45, size.batch)
    return inputs


MAKERS: dict[str, Maker] = {
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "HunyuanDiT2DModel": _hunyuan_dit,
    "SanaTransformer2DModel": _sana,
}
