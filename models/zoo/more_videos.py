"""The less common diffusion transformers of videos: with sound, faces, cameras, and histories."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor, nn

from ..case import Case
from ..inputs import Draw, Size


def _video(module: Any, size: Size, draw: Draw) -> Tensor:
    return draw.normal(size.batch, module.config.in_channels, size.frames, size.rows, size.cols)


# ------------------------------------------------------------------------------------------------ Hunyuan


def _hunyuan15() -> nn.Module:
    return diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=24,
        text_embed_2_dim=12,
        image_embed_dim=20,
        rope_axes_dim=(4, 6, 6),
        use_meanflow=True,
    )


def _hunyuan15_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """Two texts, both padded, and a picture."""
    config, text = module.config, size.tokens(1000)
    return {
        "hidden_states": _video(module, size, draw),
        "timestep": draw.full(321.0, size.batch),
        "timestep_r": draw.full(300.0, size.batch),
        "encoder_hidden_states": draw.normal(size.batch, text, config.text_embed_dim),
        "encoder_attention_mask": draw.mask(size.batch, text),
        "encoder_hidden_states_2": draw.normal(size.batch, 5, config.text_embed_2_dim),
        "encoder_attention_mask_2": draw.mask(size.batch, 5),
        "image_embeds": draw.normal(size.batch, 6, config.image_embed_dim),
    }


def _hunyuan15_textual(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """No picture: its embedding is zero."""
    inputs = _hunyuan15_inputs(module, size, draw)
    return inputs | {"image_embeds": torch.zeros_like(inputs["image_embeds"])}


def _framepack() -> nn.Module:
    return diffusers.HunyuanVideoFramepackTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=24,
        pooled_projection_dim=20,
        rope_axes_dim=(4, 6, 6),
        image_condition_type=None,
        has_image_proj=True,
        image_proj_dim=12,
        has_clean_x_embedder=True,
    )


def _framepack_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """Frames of the past: some whole, older ones at half, the oldest at a quarter of the resolution."""
    config, text = module.config, size.tokens(512)
    frames = {"history_4x": 4, "history_2x": 2, "clean": 2}
    places = torch.arange(sum(frames.values()) + size.frames).to(draw.device)
    *history, now = places.split([*frames.values(), size.frames])
    inputs: dict[str, Any] = {
        "hidden_states": _video(module, size, draw),
        "timestep": draw.full(321.0, size.batch),
        "encoder_hidden_states": draw.normal(size.batch, text, config.text_embed_dim),
        "encoder_attention_mask": draw.mask(size.batch, text),
        "pooled_projections": draw.normal(size.batch, config.pooled_projection_dim),
        "image_embeds": draw.normal(size.batch, 5, config.image_proj_dim),
        "indices_latents": now,
        "guidance": draw.full(6016.0, size.batch),
    }
    for (age, count), indices in zip(frames.items(), history, strict=True):
        inputs[f"latents_{age}"] = draw.normal(size.batch, config.in_channels, count, size.rows, size.cols)
        inputs[f"indices_latents_{age}"] = indices
    return inputs


def _motif(**options: Any) -> nn.Module:
    config: dict[str, Any] = {
        "in_channels": 9,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_single_layers": 4,
        "num_decoder_layers": 2,
        "text_embed_dim": 24,
        "image_embed_dim": 12,
        "rope_axes_dim": (4, 6, 6),
    }
    return diffusers.MotifVideoTransformer3DModel(**config | options)


def _motif_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    config, text = module.config, size.tokens(512)
    return {
        "hidden_states": _video(module, size, draw),
        "timestep": draw.full(321.0, size.batch),
        "encoder_hidden_states": draw.normal(size.batch, text, config.text_embed_dim),
        "encoder_attention_mask": draw.mask(size.batch, text),
        "image_embeds": draw.normal(size.batch, 5, config.image_embed_dim),
    }


# -------------------------------------------------------------------------------- ConsisID, EasyAnimate, LTX-2, Sana


def _consis_id() -> nn.Module:
    """Every second block sees a face, gathered from two layers of its encoder."""
    return diffusers.ConsisIDTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=8,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=24,
        num_layers=4,
        max_text_seq_length=7,
        use_rotary_positional_embeddings=True,
        is_train_face=True,
        cross_attn_dim_head=8,
        cross_attn_num_heads=2,
        LFE_id_dim=12,
        LFE_vit_dim=16,
        LFE_depth=4,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=2,
        LFE_num_querie=3,
        LFE_output_dim=32,
        LFE_num_scale=2,
    )


def _consis_id_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    config = module.config
    grid = (size.rows // config.patch_size, size.cols // config.patch_size)
    vit = [draw.normal(size.batch, 5, config.LFE_vit_dim) for _ in range(config.LFE_num_scale)]
    return {
        "hidden_states": draw.normal(size.batch, size.frames, config.in_channels, size.rows, size.cols),
        "encoder_hidden_states": draw.normal(size.batch, size.tokens(226), config.text_embed_dim),
        "timestep": draw.full(321, size.batch, dtype=torch.int64),
        "image_rotary_emb": get_3d_rotary_pos_embed(
            config.attention_head_dim, ((0, 0), grid), grid, size.frames, device=draw.device
        ),
        "id_cond": draw.normal(size.batch, config.LFE_id_dim),
        "id_vit_hidden": vit,
    }


def _easy_animate(**options: Any) -> nn.Module:
    """The given frames and a mask of them are further channels; the last block has one stream for text and video."""
    return diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=9,
        out_channels=4,
        patch_size=2,
        num_layers=3,
        mmdit_layers=2,
        time_embed_dim=16,
        text_embed_dim=24,
        text_embed_dim_t5=12,
        **options,
    )


def _easy_animate_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    config = module.config
    shape = (size.frames, size.rows, size.cols)
    return {
        "hidden_states": draw.normal(size.batch, config.out_channels, *shape),
        "timestep": draw.full(321.0, size.batch),
        "encoder_hidden_states": draw.normal(size.batch, size.tokens(1024), config.text_embed_dim),
        "encoder_hidden_states_t5": draw.normal(size.batch, 5, config.text_embed_dim_t5),
        "inpaint_latents": draw.normal(size.batch, config.in_channels - config.out_channels, *shape),
    }


def _ltx2(**options: Any) -> nn.Module:
    config: dict[str, Any] = {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "audio_in_channels": 4,
        "audio_out_channels": 4,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16,
        "num_layers": 2,
        "caption_channels": 24,
    }
    return diffusers.LTX2VideoTransformer3DModel(**config | options)


def _ltx2_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """Each place of the latent is a token, and each piece of sound."""
    config, text = module.config, size.tokens(1024)
    inputs = {
        "hidden_states": draw.normal(size.batch, size.frames * size.rows * size.cols, config.in_channels),
        "audio_hidden_states": draw.normal(size.batch, 11, config.audio_in_channels),
        "encoder_hidden_states": draw.normal(size.batch, text, config.caption_channels),
        "audio_encoder_hidden_states": draw.normal(size.batch, text, config.caption_channels),
        "timestep": draw.full(321.0, size.batch),
        "encoder_attention_mask": draw.mask(size.batch, text),
        "audio_encoder_attention_mask": draw.mask(size.batch, text),
        "num_frames": size.frames,
        "height": size.rows,
        "width": size.cols,
        "fps": 25.0,
        "audio_num_frames": 11,
    }
    return inputs | {"sigma": draw.full(321.0, size.batch)} if config.cross_attn_mod else inputs


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
        "hidden_states": _video(module, size, draw),
        "encoder_hidden_states": draw.normal(size.batch, text, module.config.caption_channels),
        "timestep": draw.full(321.0, size.batch),
        "encoder_attention_mask": draw.mask(size.batch, text),
    }


def _temporal() -> nn.Module:
    return diffusers.models.transformers.TransformerTemporalModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=16,
        num_layers=2,
        norm_num_groups=4,
        positional_embeddings="sinusoidal",
        num_positional_embeddings=8,
    )


def _temporal_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    shape = (size.batch * size.frames, module.config.in_channels, size.rows, size.cols)
    return {"hidden_states": draw.normal(*shape), "num_frames": size.frames}


CASES: tuple[Case, ...] = (
    Case("hunyuan_video15", _hunyuan15, frames=3, maker=_hunyuan15_inputs),
    Case("hunyuan_video15_textual", _hunyuan15, frames=3, maker=_hunyuan15_textual),
    Case("hunyuan_video_framepack", _framepack, multiple=2, frames=3, maker=_framepack_inputs),
    Case("motif_video", _motif, multiple=2, frames=3, maker=_motif_inputs),
    Case(
        "motif_video_crossed",
        partial(_motif, enable_text_cross_attention_dual=True, enable_text_cross_attention_single=True),
        multiple=2,
        frames=3,
        maker=_motif_inputs,
    ),
    Case("consis_id", _consis_id, multiple=2, frames=2, maker=_consis_id_inputs),
    Case("easy_animate", _easy_animate, multiple=2, frames=3, maker=_easy_animate_inputs),
    Case("ltx2_video", _ltx2, frames=2, maker=_ltx2_inputs),
    Case(
        "ltx2_video_gated",
        partial(
            _ltx2, gated_attn=True, cross_attn_mod=True, audio_gated_attn=True, audio_cross_attn_mod=True,
            rope_type="split",
        ),
        frames=2,
        maker=_ltx2_inputs,
    ),
    Case("sana_video", _sana_video, multiple=2, frames=3, maker=_sana_video_inputs),
    Case("transformer_temporal", _temporal, frames=3, text=None, maker=_temporal_inputs),
)  # fmt: skip

LEFT_OUT: dict[str, str] = {}
