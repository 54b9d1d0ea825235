"""Diffusion transformers of videos (those that descend from Wan are in `wan_videos`)."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro
from diffusers.utils import is_torchvision_available
from torch import Tensor, nn

from ..case import Case
from ..inputs import Draw, Size


def _video(module: Any, size: Size, draw: Draw) -> Tensor:
    return draw.normal(size.batch, module.config.in_channels, size.frames, size.rows, size.cols)


def _text(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """A timestep, text of `config.text_embed_dim` channels, and the mask of its padding."""
    return {
        "timestep": draw.full(321.0, size.batch),
        "encoder_hidden_states": draw.normal(size.batch, size.tokens(7), module.config.text_embed_dim),
        "encoder_attention_mask": draw.mask(size.batch, size.tokens(7)),
    }


# ------------------------------------------------------------------------------------------------ Hunyuan


_hunyuan_config: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 2,
    "text_embed_dim": 24,
    "pooled_projection_dim": 20,
    "rope_axes_dim": (4, 6, 6),
}


def _hunyuan(**options: Any) -> nn.Module:
    return diffusers.HunyuanVideoTransformer3DModel(**_hunyuan_config | options)


def _hunyuan_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    inputs = {"hidden_states": _video(module, size, draw)} | _text(module, size, draw)
    inputs["pooled_projections"] = draw.normal(size.batch, module.config.pooled_projection_dim)
    if module.config.guidance_embeds:
        inputs["guidance"] = draw.full(6016.0, size.batch)
    return inputs


# ---------------------------------------------------------------------------------------- LTX, Mochi, Cosmos


def _ltx() -> nn.Module:
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=24,
    )


def _ltx_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """Each place of the latent is a token."""
    return {
        "hidden_states": draw.normal(size.batch, size.frames * size.rows * size.cols, module.config.in_channels),
        "encoder_hidden_states": draw.normal(size.batch, size.tokens(128), module.config.caption_channels),
        "timestep": draw.full(321.0, size.batch),
        "encoder_attention_mask": draw.mask(size.batch, size.tokens(128)),
        "num_frames": size.frames,
        "height": size.rows,
        "width": size.cols,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def _ltx_conditioned(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """Some tokens belong to a given picture: each token has a place and a time of its own."""
    inputs = _ltx_inputs(module, size, draw)
    for name in ("num_frames", "height", "width", "rope_interpolation_scale"):
        del inputs[name]
    places = torch.cartesian_prod(*(torch.arange(n).float() for n in (size.frames, size.rows, size.cols)))
    inputs["video_coords"] = (places * torch.tensor([8 / 25, 32, 32])).T.repeat(size.batch, 1, 1).to(draw.device)
    given = torch.arange(len(places)) < size.rows * size.cols
    inputs["timestep"] = torch.where(given, 0.0, 321.0).repeat(size.batch, 1).to(draw.device, draw.dtype)
    return inputs


def _mochi() -> nn.Module:
    return diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        pooled_projection_dim=20,
        in_channels=4,
        text_embed_dim=24,
        time_embed_dim=16,
        max_sequence_length=7,
    )


def _mochi_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    return {"hidden_states": _video(module, size, draw)} | _text(module, size, draw)


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
        "hidden_states": _video(module, size, draw),
        "timestep": draw.full(0.321, size.batch),
        "encoder_hidden_states": draw.normal(size.batch, size.tokens(512), module.config.text_embed_dim),
        "fps": 24,
        "padding_mask": draw.full(0, 1, 1, size.rows * 8, size.cols * 8),
    }


def _cosmos_conditioned(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """The first frame is given: `in_channels` counts the mask that says so, and each frame has its own time."""
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


# ------------------------------------------------------------------------------------- Allegro, Latte, CogVideoX


def _allegro() -> nn.Module:
    return diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=2,
        cross_attention_dim=48,
        sample_height=32,
        sample_width=16,
        sample_frames=3,
        caption_channels=24,
    )


def _allegro_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    config = module.config
    rows, cols = size.rows // config.patch_size, size.cols // config.patch_size
    *freqs, grid_t, grid_h, grid_w = get_3d_rotary_pos_embed_allegro(
        config.attention_head_dim,
        ((0, 0), (rows, cols)),
        (rows, cols),
        size.frames,
        (config.interpolation_scale_t, config.interpolation_scale_h, config.interpolation_scale_w),
        device=draw.device,
    )
    places = torch.cartesian_prod(grid_t.long(), grid_h.long(), grid_w.long()).T.reshape(3, 1, -1)
    return {
        "hidden_states": _video(module, size, draw),
        "encoder_hidden_states": draw.normal(size.batch, size.tokens(512), config.caption_channels),
        "timestep": draw.full(321, size.batch, dtype=torch.int64),
        "encoder_attention_mask": draw.mask(size.batch, size.tokens(512)),
        "image_rotary_emb": (tuple(freqs), tuple(places)),
    }


def _allegro_padded(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """The lower half of the right columns is no part of the video."""
    mask = torch.ones(size.batch, size.frames, size.rows, size.cols)
    mask[:, :, size.rows // 2 :, size.cols // 2 :] = 0
    return _allegro_inputs(module, size, draw) | {"attention_mask": mask.to(draw.device, draw.dtype)}


def _latte() -> nn.Module:
    return diffusers.LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        attention_bias=True,
        sample_size=16,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=24,
        video_length=3,
    )


def _latte_inputs(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": _video(module, size, draw),
        "timestep": draw.full(321, size.batch, dtype=torch.int64),
        "encoder_hidden_states": draw.normal(size.batch, size.tokens(120), module.config.caption_channels),
    }


def _cogvideox15() -> nn.Module:
    """Two frames are one token deep; half the channels are those of the given picture."""
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=8,
        out_channels=4,
        time_embed_dim=8,
        ofs_embed_dim=8,
        text_embed_dim=24,
        num_layers=2,
        patch_size_t=2,
        max_text_seq_length=7,
        use_rotary_positional_embeddings=True,
        patch_bias=False,
    )


def _strength(module: Any, size: Size, draw: Draw) -> dict[str, Any]:
    return {"ofs": draw.full(2.0, 1)}


CASES: tuple[Case, ...] = (
    Case("hunyuan_video", _hunyuan, multiple=2, frames=3, maker=_hunyuan_inputs),
    Case(
        "hunyuan_video_replace",
        partial(_hunyuan, image_condition_type="token_replace", guidance_embeds=False),
        multiple=2,
        frames=3,
        maker=_hunyuan_inputs,
    ),
    Case("ltx_video", _ltx, frames=2, maker=_ltx_inputs),
    Case("ltx_video_conditioned", _ltx, frames=2, maker=_ltx_conditioned),
    Case("mochi", _mochi, multiple=2, frames=3, maker=_mochi_inputs),
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
    Case("allegro", _allegro, multiple=2, frames=3, maker=_allegro_inputs),
    Case("allegro_padded", _allegro, multiple=2, frames=3, maker=_allegro_padded),
    Case("latte", _latte, multiple=2, frames=3, maker=_latte_inputs),
    Case("cogvideox15_i2v", _cogvideox15, multiple=2, frames=4, extra=_strength),
)

LEFT_OUT: dict[str, str] = {}
