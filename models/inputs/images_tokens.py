"""Inputs of image transformers that take the latent as tokens, `[B, N, C]`: 2 x 2 latent pixels are one token."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

from .draw import Draw, Maker, Size


def grid(size: Size) -> tuple[int, int]:
    """Rows and columns of tokens."""
    return size.rows // 2, size.cols // 2


def _tokens(transformer: Any, size: Size, draw: Draw) -> Tensor:
    rows, cols = grid(size)
    return draw.normal(size.batch, rows * cols, transformer.config.in_channels)


def _places(size: Size, draw: Draw, dims: int = 3, first: int = 0) -> Tensor:
    """`[N, dims]`: for each token the index of its image, its row, its column, then zeros."""
    rows, cols = grid(size)
    axes = (torch.tensor([first]), torch.arange(rows), torch.arange(cols), *(torch.zeros(1) for _ in range(dims - 3)))
    return torch.cartesian_prod(*(axis.float() for axis in axes)).to(draw.device, draw.dtype)


def _bria(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    config, text = transformer.config, size.tokens(128)
    inputs: dict[str, Any] = {
        "hidden_states": _tokens(transformer, size, draw),
        "encoder_hidden_states": draw.normal(size.batch, text, config.joint_attention_dim),
        "timestep": draw.full(321.0, size.batch),
        "img_ids": _places(size, draw),
        "txt_ids": draw.full(0, text, 3),
    }
    if config.guidance_embeds:
        inputs["guidance"] = draw.full(3.5, size.batch)
    return inputs


def _bria_fibo(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """Each block reads another layer of the text encoder."""
    config, text = transformer.config, size.tokens(512)
    rows, cols = grid(size)
    blocks = config.num_layers + config.num_single_layers
    mask = torch.cat([draw.mask(size.batch, text, torch.bool), torch.ones(size.batch, rows * cols).bool()], dim=1)
    return _bria(transformer, size, draw) | {
        "text_encoder_layers": [draw.normal(size.batch, text, config.text_encoder_dim) for _ in range(blocks)],
        "joint_attention_kwargs": {"attention_mask": mask[:, None, None, :].to(draw.device)},
    }


def _chroma(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    rows, cols = grid(size)
    text = size.tokens(512)
    picture = torch.ones(size.batch, rows * cols, dtype=torch.bool)
    return {
        "hidden_states": _tokens(transformer, size, draw),
        "encoder_hidden_states": draw.normal(size.batch, text, transformer.config.joint_attention_dim),
        "timestep": draw.full(0.321, size.batch),
        "img_ids": _places(size, draw),
        "txt_ids": draw.full(0, text, 3),
        "attention_mask": torch.cat([draw.mask(size.batch, text, torch.bool), picture.to(draw.device)], dim=1),
    }


def _flux_2(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    config, text = transformer.config, size.tokens(512)
    dims = len(config.axes_dims_rope)
    numbers = torch.zeros(text, dims)
    numbers[:, -1] = torch.arange(text)
    inputs: dict[str, Any] = {
        "hidden_states": _tokens(transformer, size, draw),
        "encoder_hidden_states": draw.normal(size.batch, text, config.joint_attention_dim),
        "timestep": draw.full(0.321, size.batch),
        "img_ids": _places(size, draw, dims),
        "txt_ids": numbers.to(draw.device, draw.dtype),
    }
    if config.get("guidance_embeds"):
        inputs["guidance"] = draw.full(3.5, size.batch)
    if config.get("flow_map"):
        inputs["target_timestep"] = draw.full(0.3, size.batch)
    return inputs


def flux_2_reference(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """An image to edit, whose tokens follow those of the generated image."""
    inputs = _flux_2(transformer, size, draw)
    dims = len(transformer.config.axes_dims_rope)
    return {
        "hidden_states": torch.cat([inputs["hidden_states"], _tokens(transformer, size, draw)], dim=1),
        "img_ids": torch.cat([inputs["img_ids"], _places(size, draw, dims, first=10)]),
    }


def flux_3_reference(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """An image to edit, as a separate stream."""
    rows, cols = grid(size)
    dims = len(transformer.config.axes_dims_rope)
    return {
        "image_cond_hidden_states": draw.normal(size.batch, rows * cols, transformer.config.cond_in_channels),
        "image_cond_ids": _places(size, draw, dims, first=10),
    }


def _ideogram(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """Text, padded on the left, and the image in one sequence; integers say which token is what."""
    config, text = transformer.config, size.tokens(256)
    real = draw.mask(size.batch, text, torch.int64).flip(1)
    picture = _places(size, draw).to(torch.int64).expand(size.batch, -1, -1)
    kind = torch.full_like(picture[..., 0], 2)
    counted = (real.cumsum(dim=1) - 1).clamp(min=0)[..., None].expand(-1, -1, 3)
    hidden = _tokens(transformer, size, draw)
    return {
        "hidden_states": torch.cat([torch.zeros_like(hidden[:, :1]).expand(-1, text, -1), hidden], dim=1),
        "timestep": draw.full(0.321, size.batch),
        "encoder_hidden_states": draw.normal(size.batch, text + picture.shape[1], config.llm_features_dim),
        "position_ids": torch.cat([counted, picture + 65536], dim=1),
        "segment_ids": torch.cat([2 * real - 1, torch.ones_like(kind)], dim=1),
        "indicator": torch.cat([3 * real, kind], dim=1),
    }


def _krea(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    config, text = transformer.config, size.tokens(512)
    return {
        "hidden_states": _tokens(transformer, size, draw),
        "encoder_hidden_states": draw.normal(size.batch, text, config.num_text_layers, config.text_hidden_dim),
        "timestep": draw.full(0.321, size.batch),
        "position_ids": torch.cat([draw.full(0, text, 3), _places(size, draw)]),
        "encoder_attention_mask": draw.mask(size.batch, text, torch.bool),
    }


def _numbered_text(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """Text tokens have positions like images, equal on two axes."""
    text = size.tokens(256)
    numbers = torch.arange(text).float()
    return {
        "hidden_states": _tokens(transformer, size, draw),
        "encoder_hidden_states": draw.normal(size.batch, text, transformer.config.joint_attention_dim),
        "timestep": draw.full(0.321, size.batch),
        "img_ids": _places(size, draw, first=1),
        "txt_ids": torch.stack([torch.zeros(text), numbers, numbers], dim=1).to(draw.device, draw.dtype),
    }


def _qwen(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """Models for editing have a second, smaller image; layered ones several images."""
    config, text = transformer.config, size.tokens(256)
    rows, cols = grid(size)
    pictures = [(1, rows, cols)]
    if config.get("use_layer3d_rope"):
        pictures *= 3
    if config.get("zero_cond_t") or config.get("use_layer3d_rope"):
        pictures.append((1, rows // 2, cols))
    inputs: dict[str, Any] = {
        "hidden_states": draw.normal(size.batch, sum(high * wide for _, high, wide in pictures), config.in_channels),
        "encoder_hidden_states": draw.normal(size.batch, text, config.joint_attention_dim),
        "encoder_hidden_states_mask": draw.mask(size.batch, text, torch.bool),
        "timestep": draw.full(0.321, size.batch),
        "img_shapes": [pictures] * size.batch,
    }
    if config.get("use_additional_t_cond"):
        inputs["additional_t_cond"] = draw.full(0, size.batch, dtype=torch.int64)
    return inputs


def _qwen_21(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """An image to edit inside the text, 2 x 2 of its latent pixels per text position; then the edited image."""
    config, text = transformer.config, size.tokens(256)
    pictures = [(1, 4, size.cols), (1, size.rows, size.cols)]
    slots = [high * wide // 4 for _, high, wide in pictures]
    before = text // 2
    image = torch.zeros(size.batch, text + sum(slots), dtype=torch.bool)
    image[:, before : before + slots[0]] = True
    image[:, text + slots[0] :] = True
    return {
        "hidden_states": draw.normal(size.batch, 4 * sum(slots), config.in_channels),
        "encoder_hidden_states": draw.normal(size.batch, text + slots[0], config.context_in_dim),
        "encoder_hidden_states_mask": (
            draw.mask(size.batch, text + slots[0], torch.bool) | image[:, : text + slots[0]].to(draw.device)
        ),
        "timestep": draw.full(0.321, size.batch),
        "img_shapes": [pictures] * size.batch,
        "img_mask": image.to(draw.device),
    }


def _flux(transformer: diffusers.FluxTransformer2DModel, size: Size, draw: Draw) -> dict[str, Any]:
    """The latent is packed: 2 x 2 of its pixels are one token."""
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


MAKERS: dict[str, Maker] = {
    "FluxTransformer2DModel": _flux,
    "BriaTransformer2DModel": _bria,
    "BriaFiboTransformer2DModel": _bria_fibo,
    "ChromaTransformer2DModel": _chroma,
    "Flux2Transformer2DModel": _flux_2,
    "Flux3Transformer2DModel": _flux_2,
    "Ideogram4Transformer2DModel": _ideogram,
    "Krea2Transformer2DModel": _krea,
    "LongCatImageTransformer2DModel": _numbered_text,
    "NucleusMoEImageTransformer2DModel": _qwen,
    "OvisImageTransformer2DModel": _numbered_text,
    "QwenImageTransformer2DModel": _qwen,
    "QwenImage21Transformer2DModel": _qwen_21,
}
