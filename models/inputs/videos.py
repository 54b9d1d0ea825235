"""Inputs of video transformers."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_rotary_pos_embed_allegro
from torch import Tensor

from .draw import Draw, Maker, Size


def _video(transformer: Any, size: Size, draw: Draw) -> Tensor:
    return draw.normal(size.batch, transformer.config.in_channels, size.frames, size.rows, size.cols)


def _wan(transformer: diffusers.WanTransformer3DModel, size: Size, draw: Draw) -> dict[str, Any]:
    config = transformer.config
    inputs: dict[str, Any] = {
        "hidden_states": _video(transformer, size, draw),
        "timestep": draw.full(321, size.batch, dtype=torch.int64),
        "encoder_hidden_states": draw.normal(size.batch, size.tokens(512), config.text_dim),
    }
    if config.image_dim is not None:
        inputs["encoder_hidden_states_image"] = draw.normal(size.batch, 257, config.image_dim)
    return inputs


def _wan_vace(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """Some blocks see the control video, each with its own scale."""
    config = transformer.config
    return _wan(transformer, size, draw) | {
        "control_hidden_states": draw.normal(size.batch, config.vace_in_channels, size.frames, size.rows, size.cols),
        "control_hidden_states_scale": draw.full(1, len(config.vace_layers)),
    }


def _cogvideox(transformer: diffusers.CogVideoXTransformer3DModel, size: Size, draw: Draw) -> dict[str, Any]:
    config = transformer.config
    text = size.tokens(config.max_text_seq_length)
    inputs: dict[str, Any] = {
        "hidden_states": draw.normal(size.batch, size.frames, config.in_channels, size.rows, size.cols),
        "encoder_hidden_states": draw.normal(size.batch, text, config.text_embed_dim),
        "timestep": draw.full(321, size.batch, dtype=torch.int64),
    }
    if config.use_rotary_positional_embeddings:
        grid = (size.rows // config.patch_size, size.cols // config.patch_size)
        frames = size.frames // (config.patch_size_t or 1)
        inputs["image_rotary_emb"] = get_3d_rotary_pos_embed(
            config.attention_head_dim, ((0, 0), grid), grid, frames, device=draw.device
        )
    return inputs


def _hunyuan_video(transformer: diffusers.HunyuanVideoTransformer3DModel, size: Size, draw: Draw) -> dict[str, Any]:
    config = transformer.config
    text = size.tokens(256)
    inputs: dict[str, Any] = {
        "hidden_states": _video(transformer, size, draw),
        "timestep": draw.full(321.0, size.batch),
        "encoder_hidden_states": draw.normal(size.batch, text, config.text_embed_dim),
        "encoder_attention_mask": draw.mask(size.batch, text, torch.int64),
        "pooled_projections": draw.normal(size.batch, config.pooled_projection_dim),
    }
    if config.guidance_embeds:
        inputs["guidance"] = draw.full(6000.0, size.batch)
    return inputs


def _hunyuan_video_15(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """Two texts, both padded, and the embedding of an image: zero where there is none."""
    config, text, glyphs = transformer.config, size.tokens(1000), size.tokens(256)
    inputs: dict[str, Any] = {
        "hidden_states": _video(transformer, size, draw),
        "timestep": draw.full(321.0, size.batch),
        "encoder_hidden_states": draw.normal(size.batch, text, config.text_embed_dim),
        "encoder_attention_mask": draw.mask(size.batch, text),
        "encoder_hidden_states_2": draw.normal(size.batch, glyphs, config.text_embed_2_dim),
        "encoder_attention_mask_2": draw.mask(size.batch, glyphs),
        "image_embeds": draw.known(config.task_type == "i2v", size.batch, 729, config.image_embed_dim),
    }
    if config.use_meanflow:
        inputs["timestep_r"] = draw.full(300.0, size.batch)
    return inputs


def _ltx(transformer: diffusers.LTXVideoTransformer3DModel, size: Size, draw: Draw) -> dict[str, Any]:
    """The latent is flattened to tokens; positions follow from its size."""
    config = transformer.config
    text = size.tokens(128)
    return {
        "hidden_states": draw.normal(size.batch, size.frames * size.rows * size.cols, config.in_channels),
        "encoder_hidden_states": draw.normal(size.batch, text, config.caption_channels),
        "timestep": draw.full(321.0, size.batch),
        "encoder_attention_mask": draw.mask(size.batch, text),
        "num_frames": size.frames,
        "height": size.rows,
        "width": size.cols,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def _ltx_2(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """Video and audio (25 tokens per second) as tokens with positions; learned tokens pad the text."""
    config, text, rate = transformer.config, size.tokens(1024), 24.0
    pieces = round((1 + 8 * (size.frames - 1)) / rate * 25)
    seen = draw.full(1, size.batch, text, dtype=torch.int64)
    inputs = {
        "hidden_states": draw.normal(size.batch, size.frames * size.rows * size.cols, config.in_channels),
        "audio_hidden_states": draw.normal(size.batch, pieces, config.audio_in_channels),
        "encoder_hidden_states": draw.normal(size.batch, text, config.caption_channels),
        "audio_encoder_hidden_states": draw.normal(size.batch, text, config.caption_channels),
        "timestep": draw.full(321.0, size.batch),
        "encoder_attention_mask": seen,
        "audio_encoder_attention_mask": seen,
        "num_frames": size.frames,
        "height": size.rows,
        "width": size.cols,
        "fps": rate,
        "audio_num_frames": pieces,
        "video_coords": transformer.rope.prepare_video_coords(
            size.batch, size.frames, size.rows, size.cols, draw.device, fps=rate
        ),
        "audio_coords": transformer.audio_rope.prepare_audio_coords(size.batch, pieces, draw.device),
    }
    return inputs | {"sigma": inputs["timestep"]} if config.cross_attn_mod else inputs


def _mochi(transformer: diffusers.MochiTransformer3DModel, size: Size, draw: Draw) -> dict[str, Any]:
    text = size.tokens(transformer.config.max_sequence_length)
    return {
        "hidden_states": _video(transformer, size, draw),
        "encoder_hidden_states": draw.normal(size.batch, text, transformer.config.text_embed_dim),
        "timestep": draw.full(321.0, size.batch),
        "encoder_attention_mask": draw.mask(size.batch, text, torch.bool),
    }


def _kandinsky5(transformer: diffusers.Kandinsky5Transformer3DModel, size: Size, draw: Draw) -> dict[str, Any]:
    """The latent has its channels last, and with `visual_cond` a condition and its mask as further channels."""
    config = transformer.config
    channels = 2 * config.in_visual_dim + 1 if config.visual_cond else config.in_visual_dim
    text = size.tokens(256)
    extents = (size.frames, size.rows, size.cols)
    return {
        "hidden_states": draw.normal(size.batch, *extents, channels),
        "encoder_hidden_states": draw.normal(size.batch, text, config.in_text_dim),
        "pooled_projections": draw.normal(size.batch, config.in_text_dim2),
        "timestep": draw.full(321.0, size.batch),
        "visual_rope_pos": [
            torch.arange(n // p).to(draw.device) for n, p in zip(extents, config.patch_size, strict=True)
        ],
        "text_rope_pos": torch.arange(text).to(draw.device),
    }


def _allegro(transformer: diffusers.AllegroTransformer3DModel, size: Size, draw: Draw) -> dict[str, Any]:
    config = transformer.config
    text = size.tokens(512)
    rows, cols = size.rows // config.patch_size, size.cols // config.patch_size
    scales = (config.interpolation_scale_t, config.interpolation_scale_h, config.interpolation_scale_w)
    *angles, t, h, w = get_3d_rotary_pos_embed_allegro(  # pyright: ignore[reportAssignmentType]
        config.attention_head_dim, ((0, 0), (rows, cols)), (rows, cols), size.frames, scales, device=draw.device
    )
    places = torch.cartesian_prod(t, h, w).to(torch.int64)
    return {
        "hidden_states": _video(transformer, size, draw),
        "encoder_hidden_states": draw.normal(size.batch, text, config.caption_channels),
        "encoder_attention_mask": draw.mask(size.batch, text, torch.int64),
        "timestep": draw.full(321, size.batch, dtype=torch.int64),
        "image_rotary_emb": (tuple(angles), tuple(place.reshape(1, -1) for place in places.unbind(1))),
    }


def _sana_video(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    text = size.tokens(300)
    return {
        "hidden_states": _video(transformer, size, draw),
        "encoder_hidden_states": draw.normal(size.batch, text, transformer.config.caption_channels),
        "encoder_attention_mask": draw.mask(size.batch, text, torch.int64),
        "timestep": draw.full(321.0, size.batch),
    }


MAKERS: dict[str, Maker] = {
    "WanTransformer3DModel": _wan,
    "WanVACETransformer3DModel": _wan_vace,
    "SkyReelsV2Transformer3DModel": _wan,
    "CogVideoXTransformer3DModel": _cogvideox,
    "HunyuanVideoTransformer3DModel": _hunyuan_video,
    "HunyuanVideo15Transformer3DModel": _hunyuan_video_15,
    "LTXVideoTransformer3DModel": _ltx,
    "LTX2VideoTransformer3DModel": _ltx_2,
    "MochiTransformer3DModel": _mochi,
    "Kandinsky5Transformer3DModel": _kandinsky5,
    "AllegroTransformer3DModel": _allegro,
    "SanaVideoTransformer3DModel": _sana_video,
}
