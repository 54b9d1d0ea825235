"""Inputs of image transformers that take the latent as a grid, `[B, C, H, W]`."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed, get_2d_rotary_pos_embed_lumina
from torch import Tensor

from .draw import Draw, Maker, Size


def _latent(transformer: Any, size: Size, draw: Draw) -> Tensor:
    return draw.normal(size.batch, transformer.config.in_channels, size.rows, size.cols)


def _aura_flow(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": _latent(transformer, size, draw),
        "encoder_hidden_states": draw.normal(size.batch, size.tokens(256), transformer.config.joint_attention_dim),
        "timestep": draw.full(0.321, size.batch),
    }


def _bria_fibo_2(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """The text: outputs of several encoder layers, one for the gist tokens and one for each layer that reads it."""
    config, text = transformer.config, size.tokens(512)
    return {
        "hidden_states": _latent(transformer, size, draw),
        "timestep": draw.full(0.321, size.batch),
        "encoder_hidden_states": draw.normal(
            size.batch, 1 + len(config.injection_layer_ids), text, config.cap_feat_dim
        ),
        "encoder_attention_mask": draw.mask(size.batch, text, torch.bool),
    }


def _cogview(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    pixels = torch.tensor([8.0 * size.rows, 8.0 * size.cols]).to(draw.device, draw.dtype).repeat(size.batch, 1)
    return {
        "hidden_states": _latent(transformer, size, draw),
        "encoder_hidden_states": draw.normal(size.batch, size.tokens(224), transformer.config.text_embed_dim),
        "timestep": draw.full(321.0, size.batch),
        "original_size": pixels,
        "target_size": pixels,
        "crop_coords": draw.full(0, size.batch, 2),
    }


def _ernie(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    text = size.tokens(256)
    return {
        "hidden_states": _latent(transformer, size, draw),
        "timestep": draw.full(321.0, size.batch),
        "text_bth": draw.normal(size.batch, text, transformer.config.text_in_dim),
        "text_lens": draw.mask(size.batch, text, torch.int64).sum(dim=1),
    }


def _glm(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    config = transformer.config
    places = (size.rows // config.patch_size) * (size.cols // config.patch_size)
    pixels = torch.tensor([8.0 * size.rows, 8.0 * size.cols]).to(draw.device, draw.dtype).repeat(size.batch, 1)
    return {
        "hidden_states": _latent(transformer, size, draw),
        "encoder_hidden_states": draw.normal(size.batch, size.tokens(64), config.text_embed_dim),
        "prior_token_id": draw.integers(config.prior_vq_quantizer_codebook_size, size.batch, places),
        "prior_token_drop": draw.full(False, size.batch, places, dtype=torch.bool),
        "timestep": draw.full(321.0, size.batch),
        "target_size": pixels,
        "crop_coords": draw.full(0, size.batch, 2),
    }


def _hidream(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    config, text = transformer.config, size.tokens(128)
    wide, llama = config.caption_channels
    return {
        "hidden_states": _latent(transformer, size, draw),
        "timesteps": draw.full(321.0, size.batch),
        "encoder_hidden_states_t5": draw.normal(size.batch, text, wide),
        "encoder_hidden_states_llama3": draw.normal(1 + max(config.llama_layers), size.batch, text, llama),
        "pooled_embeds": draw.normal(size.batch, config.text_emb_dim),
    }


def _hunyuan_image(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    config, text = transformer.config, size.tokens(1000)
    shape = (size.frames, size.rows, size.cols)[3 - len(config.patch_size) :]
    inputs: dict[str, Any] = {
        "hidden_states": draw.normal(size.batch, config.in_channels, *shape),
        "timestep": draw.full(321.0, size.batch),
        "encoder_hidden_states": draw.normal(size.batch, text, config.text_embed_dim),
        "encoder_attention_mask": draw.mask(size.batch, text, torch.int64),
    }
    if config.text_embed_2_dim is not None:
        glyphs = size.tokens(128)
        inputs["encoder_hidden_states_2"] = draw.normal(size.batch, glyphs, config.text_embed_2_dim)
        inputs["encoder_attention_mask_2"] = draw.mask(size.batch, glyphs, torch.int64)
    if config.guidance_embeds:
        inputs["guidance"] = draw.full(3500.0, size.batch)
    if config.use_meanflow:
        inputs["timestep_r"] = draw.full(300.0, size.batch)
    return inputs


def _joy(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """The image to edit and the edited one, as two items."""
    config = transformer.config
    return {
        "hidden_states": draw.normal(size.batch, 2, config.in_channels, 1, size.rows, size.cols),
        "timestep": draw.full(321.0, size.batch),
        "encoder_hidden_states": draw.normal(size.batch, size.tokens(256), config.text_dim),
    }


def _joy_plus(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """The edited image and a smaller one to edit, cut into patches and padded at the end."""
    config = transformer.config
    depth, high, wide = config.patch_size
    shapes = [(1, size.rows // high, size.cols // wide), (1, size.rows // high // 2, size.cols // wide)]
    places, text = sum(rows * cols for _, rows, cols in shapes) + 3, size.tokens(256)
    return {
        "hidden_states": draw.normal(size.batch, places, config.in_channels, depth, high, wide),
        "timestep": draw.full(321.0, size.batch),
        "encoder_hidden_states": draw.normal(size.batch, text, config.text_dim),
        "encoder_hidden_states_mask": draw.mask(size.batch, text),
        "shape_list": [shapes] * size.batch,
    }


def _lumina(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    config, text = transformer.config, size.tokens(256)
    head = config.hidden_size // config.num_attention_heads
    return {
        "hidden_states": _latent(transformer, size, draw),
        "timestep": draw.full(0.321, size.batch),
        "encoder_hidden_states": draw.normal(size.batch, text, config.cross_attention_dim),
        "encoder_mask": draw.mask(size.batch, text, torch.int64),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(head, 384, 384).to(draw.device),
        "cross_attention_kwargs": {},
    }


def _lumina_2(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    text = size.tokens(256)
    return {
        "hidden_states": _latent(transformer, size, draw),
        "timestep": draw.full(0.321, size.batch),
        "encoder_hidden_states": draw.normal(size.batch, text, transformer.config.cap_feat_dim),
        "encoder_attention_mask": draw.mask(size.batch, text, torch.int64),
    }


def _omnigen(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """Text, padded on the left, then the time token and the image; the text has causal attention."""
    config, text = transformer.config, size.tokens(64)
    picture = (size.rows // config.patch_size) * (size.cols // config.patch_size)
    length = text + 1 + picture
    real = draw.mask(size.batch, text, torch.int64).flip(1)
    keys = torch.cat([real, torch.ones_like(real[:, :1]).expand(-1, 1 + picture)], dim=1)
    causal = torch.ones(length, length).tril().to(draw.device)
    causal[text + 1 :] = 1
    return {
        "hidden_states": _latent(transformer, size, draw),
        "timestep": draw.full(0.321, size.batch),
        "input_ids": draw.integers(config.vocab_size, size.batch, text),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": (causal[None] * keys[:, None]).to(torch.int64),
        "position_ids": (keys.cumsum(dim=1) - 1).clamp(min=0),
    }


def _prior(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """It denoises the embedding of an image: only the text has rows."""
    config = transformer.config
    return {
        "hidden_states": draw.normal(size.batch, config.embedding_dim),
        "timestep": draw.full(321, dtype=torch.int64),
        "proj_embedding": draw.normal(size.batch, config.embedding_proj_dim or config.embedding_dim),
        "encoder_hidden_states": draw.normal(size.batch, config.num_embeddings, config.embedding_dim),
        "attention_mask": draw.mask(size.batch, config.num_embeddings, torch.bool),
    }


def _prx(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    text = size.tokens(256)
    return {
        "hidden_states": _latent(transformer, size, draw),
        "timestep": draw.full(0.321, size.batch),
        "encoder_hidden_states": draw.normal(size.batch, text, transformer.config.context_in_dim),
        "attention_mask": draw.mask(size.batch, text, torch.bool),
    }


def _z_image(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """Images and texts come as lists; the texts differ in length."""
    config = transformer.config
    lengths = draw.lengths(size.batch, size.tokens(128))
    return {
        "x": [draw.normal(config.in_channels, 1, size.rows, size.cols) for _ in range(size.batch)],
        "t": draw.full(0.321, size.batch),
        "cap_feats": [draw.normal(length, config.cap_feat_dim) for length in lengths],
    }


def _dit(transformer: diffusers.DiTTransformer2DModel, size: Size, draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": _latent(transformer, size, draw),
        "timestep": draw.full(321, size.batch, dtype=torch.int64),
        "class_labels": draw.integers(transformer.config.num_embeds_ada_norm, size.batch),
    }


def _hunyuan_dit(transformer: diffusers.HunyuanDiT2DModel, size: Size, draw: Draw) -> dict[str, Any]:
    config = transformer.config
    rows, cols = size.rows // config.patch_size, size.cols // config.patch_size
    rotary = get_2d_rotary_pos_embed(
        config.attention_head_dim, ((0, 0), (rows, cols)), (rows, cols), device=draw.device, output_type="pt"
    )
    inputs: dict[str, Any] = {
        "hidden_states": _latent(transformer, size, draw),
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
        "hidden_states": _latent(transformer, size, draw),
        "encoder_hidden_states": draw.normal(size.batch, text, transformer.config.caption_channels),
        "encoder_attention_mask": draw.mask(size.batch, text),
        "timestep": draw.full(321, size.batch, dtype=torch.int64),
        "added_cond_kwargs": added,
    }


def _sana(transformer: diffusers.SanaTransformer2DModel, size: Size, draw: Draw) -> dict[str, Any]:
    text = size.tokens(300)
    inputs: dict[str, Any] = {
        "hidden_states": _latent(transformer, size, draw),
        "encoder_hidden_states": draw.normal(size.batch, text, transformer.config.caption_channels),
        "encoder_attention_mask": draw.mask(size.batch, text, torch.int64),
        "timestep": draw.full(321.0, size.batch),
    }
    if transformer.config.guidance_embeds:
        inputs["guidance"] = draw.full(0.45, size.batch)
    return inputs


def _sd3(transformer: diffusers.SD3Transformer2DModel, size: Size, draw: Draw) -> dict[str, Any]:
    config = transformer.config
    return {
        "hidden_states": _latent(transformer, size, draw),
        "timestep": draw.full(321.0, size.batch),
        "encoder_hidden_states": draw.normal(size.batch, size.tokens(77 + 256), config.joint_attention_dim),
        "pooled_projections": draw.normal(size.batch, config.pooled_projection_dim),
    }


MAKERS: dict[str, Maker] = {
    "DiTTransformer2DModel": _dit,
    "HunyuanDiT2DModel": _hunyuan_dit,
    "PixArtTransformer2DModel": _pixart,
    "SanaTransformer2DModel": _sana,
    "SD3Transformer2DModel": _sd3,
    "AuraFlowTransformer2DModel": _aura_flow,
    "BriaFibo2Transformer2DModel": _bria_fibo_2,
    "CogView3PlusTransformer2DModel": _cogview,
    "CogView4Transformer2DModel": _cogview,
    "ErnieImageTransformer2DModel": _ernie,
    "GlmImageTransformer2DModel": _glm,
    "HiDreamImageTransformer2DModel": _hidream,
    "HunyuanImageTransformer2DModel": _hunyuan_image,
    "JoyImageEditTransformer3DModel": _joy,
    "JoyImageEditPlusTransformer3DModel": _joy_plus,
    "LuminaNextDiT2DModel": _lumina,
    "Lumina2Transformer2DModel": _lumina_2,
    "OmniGenTransformer2DModel": _omnigen,
    "PriorTransformer": _prior,
    "PRXTransformer2DModel": _prx,
    "ZImageTransformer2DModel": _z_image,
}
