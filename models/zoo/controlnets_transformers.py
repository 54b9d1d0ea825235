"""ControlNets of diffusion transformers."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.utils import is_torchvision_available
from torch import nn

from ..case import Case
from ..inputs import Draw, Size, example_inputs


def _sd3(**options: Any) -> nn.Module:
    return diffusers.SD3ControlNetModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        pos_embed_max_size=64,
        **options,
    )


def _sd3_inputs(net: Any, size: Size, draw: Draw) -> dict[str, Any]:
    config = net.config
    channels = config.in_channels + config.extra_conditioning_channels
    return {
        "hidden_states": draw.normal(size.batch, config.in_channels, size.rows, size.cols),
        "controlnet_cond": draw.normal(size.batch, channels, size.rows, size.cols),
        "conditioning_scale": 0.8,
        "encoder_hidden_states": draw.normal(size.batch, size.tokens(77), config.joint_attention_dim),
        "pooled_projections": draw.normal(size.batch, config.pooled_projection_dim),
        "timestep": draw.full(321.0, size.batch),
    }


def _doubled(inputs: dict[str, Any], size: Size, draw: Draw) -> dict[str, Any]:
    """The same inputs with two control images."""
    one = inputs["controlnet_cond"]
    both = [one, draw.normal(*one.shape)]
    return inputs | {"controlnet_cond": both, "conditioning_scale": [0.7, 1.2], "return_dict": False}


def _flux(**options: Any) -> nn.Module:
    return diffusers.FluxControlNetModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=True,
        axes_dims_rope=[4, 6, 6],
        **options,
    )


def _flux_inputs(net: Any, size: Size, draw: Draw) -> dict[str, Any]:
    config = net.config
    rows, cols, text = size.rows // 2, size.cols // 2, size.tokens(512)
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(rows).float(), torch.arange(cols).float())
    shape = (size.batch, rows * cols, config.in_channels)
    inputs: dict[str, Any] = {
        "hidden_states": draw.normal(*shape),
        "controlnet_cond": draw.normal(*shape),
        "conditioning_scale": 0.8,
        "encoder_hidden_states": draw.normal(size.batch, text, config.joint_attention_dim),
        "pooled_projections": draw.normal(size.batch, config.pooled_projection_dim),
        "timestep": draw.full(0.321, size.batch),
        "img_ids": places.to(draw.device, draw.dtype),
        "txt_ids": draw.full(0, text, 3),
        "guidance": draw.full(3.5, size.batch),
    }
    if config.conditioning_embedding_channels is not None:
        inputs["controlnet_cond"] = draw.normal(size.batch, 3, size.rows * 8, size.cols * 8)
    if config.num_mode is not None:
        inputs["controlnet_mode"] = draw.integers(config.num_mode, size.batch, 1)
    return inputs


def _flux_several(nets: Any, size: Size, draw: Draw) -> dict[str, Any]:
    inputs = _doubled(_flux_inputs(nets.nets[0], size, draw), size, draw)
    return inputs | {"controlnet_mode": [draw.integers(4, size.batch) for _ in range(2)]}


def _hunyuan() -> nn.Module:
    return diffusers.HunyuanDiT2DControlNetModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        sample_size=16,
        hidden_size=32,
        transformer_num_layers=4,
        cross_attention_dim=24,
        cross_attention_dim_t5=16,
        pooled_projection_dim=16,
        text_len=5,
        text_len_t5=6,
        use_style_cond_and_image_meta_size=True,
    )


def _hunyuan_inputs(net: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """Inputs of the transformer, and the control image."""
    transformer = diffusers.HunyuanDiT2DModel(num_layers=2, **{
        key: net.config[key]
        for key in (
            "num_attention_heads", "attention_head_dim", "in_channels", "patch_size", "sample_size", "hidden_size",
            "cross_attention_dim", "cross_attention_dim_t5", "pooled_projection_dim", "text_len", "text_len_t5",
        )
    })  # fmt: skip
    seed = int(draw.integers(2**31, 1))
    inputs = example_inputs(transformer, size.rows, size.cols, batch=size.batch, seed=seed)
    return inputs | {"controlnet_cond": draw.normal(*inputs["hidden_states"].shape), "conditioning_scale": 0.8}


def _qwen() -> nn.Module:
    return diffusers.QwenImageControlNetModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    )


def _qwen_inputs(net: Any, size: Size, draw: Draw) -> dict[str, Any]:
    config, text = net.config, size.tokens(256)
    rows, cols = size.rows // 2, size.cols // 2
    return {
        "hidden_states": draw.normal(size.batch, rows * cols, config.in_channels),
        "controlnet_cond": draw.normal(size.batch, rows * cols, config.in_channels),
        "conditioning_scale": 0.8,
        "encoder_hidden_states": draw.normal(size.batch, text, config.joint_attention_dim),
        "encoder_hidden_states_mask": draw.mask(size.batch, text, torch.bool),
        "timestep": draw.full(0.321, size.batch),
        "img_shapes": [[(1, rows, cols)]] * size.batch,
    }


def _sana() -> nn.Module:
    return diffusers.SanaControlNetModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=24,
        sample_size=16,
    )


def _sana_inputs(net: Any, size: Size, draw: Draw) -> dict[str, Any]:
    config, text = net.config, size.tokens(300)
    shape = (size.batch, config.in_channels, size.rows, size.cols)
    return {
        "hidden_states": draw.normal(*shape),
        "encoder_hidden_states": draw.normal(size.batch, text, config.caption_channels),
        "timestep": draw.full(321.0, size.batch),
        "controlnet_cond": draw.normal(*shape),
        "conditioning_scale": 0.8,
        "encoder_attention_mask": draw.mask(size.batch, text, torch.int64),
    }


def _cosmos() -> nn.Module:
    return diffusers.CosmosControlNetModel(
        n_controlnet_blocks=2,
        in_channels=10,
        latent_channels=6,
        model_channels=32,
        num_attention_heads=2,
        attention_head_dim=16,
        mlp_ratio=2,
        text_embed_dim=20,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        extra_pos_embed_type="learnable",
        img_context_dim_in=12,
        img_context_dim_out=20,
        use_crossattn_projection=True,
        crossattn_proj_in_channels=24,
        encoder_hidden_states_channels=20,
    )


def _cosmos_inputs(net: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """The control latent has fewer channels than the model expects."""
    shape = (size.frames, size.rows, size.cols)
    mask = torch.zeros(size.batch, 1, *shape)
    mask[:, :, 0] = 1
    text = draw.normal(size.batch, size.tokens(512), net.config.crossattn_proj_in_channels)
    return {
        "controls_latents": draw.normal(size.batch, 4, *shape),
        "latents": draw.normal(size.batch, 4, *shape),
        "timestep": draw.full(0.321, size.batch),
        "encoder_hidden_states": (text, draw.normal(size.batch, 5, net.config.img_context_dim_in)),
        "condition_mask": mask.to(draw.device, draw.dtype),
        "conditioning_scale": [0.7, 1.2],
        "padding_mask": draw.normal(1, 1, size.rows * 8, size.cols * 8),
        "fps": 16,
    }


def _z_image(kind: str | None) -> nn.Module:
    """It shares its embeddings with its transformer."""
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=24,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 64, 64],
    )
    net = diffusers.ZImageControlNetModel(
        control_layers_places=[0, 1],
        control_refiner_layers_places=[0, 1],
        control_in_dim=4,
        add_control_noise_refiner=kind,  # type: ignore[arg-type]
        dim=32,
        n_heads=2,
        n_kv_heads=2,
    )
    return diffusers.ZImageControlNetModel.from_transformer(net, transformer)


def _z_image_inputs(net: Any, size: Size, draw: Draw) -> dict[str, Any]:
    shape = (4, 1, size.rows, size.cols)
    return {
        "x": [draw.normal(*shape) for _ in range(size.batch)],
        "t": draw.full(0.321, size.batch),
        "cap_feats": [draw.normal(size.tokens(64), 24) for _ in range(size.batch)],
        "control_context": [draw.normal(*shape) for _ in range(size.batch)],
        "conditioning_scale": 0.8,
    }


CASES: tuple[Case, ...] = (
    Case("controlnet_sd3", lambda: _sd3(extra_conditioning_channels=1), multiple=2, maker=_sd3_inputs),
    Case("controlnet_sd35", lambda: _sd3(pos_embed_type=None, use_pos_embed=True), multiple=2, maker=_sd3_inputs),
    Case(
        "controlnets_sd3",
        lambda: diffusers.SD3MultiControlNetModel([_sd3(), _sd3()]),
        multiple=2,
        maker=lambda nets, size, draw: _doubled(_sd3_inputs(nets.nets[0], size, draw), size, draw),
    ),
    Case("controlnet_flux", _flux, multiple=2, maker=_flux_inputs),
    Case("controlnet_flux_union", lambda: _flux(num_mode=4), multiple=2, maker=_flux_inputs),
    Case(
        "controlnet_flux_hint",
        lambda: _flux(conditioning_embedding_channels=4, patch_size=2),
        multiple=2,
        maker=_flux_inputs,
    ),
    Case(
        "controlnets_flux",
        lambda: diffusers.FluxMultiControlNetModel([_flux(num_mode=4)]),
        multiple=2,
        maker=_flux_several,
    ),
    Case("controlnet_hunyuan", _hunyuan, multiple=2, text=None, maker=_hunyuan_inputs),
    Case(
        "controlnets_hunyuan",
        lambda: diffusers.HunyuanDiT2DMultiControlNetModel([_hunyuan(), _hunyuan()]),
        multiple=2,
        text=None,
        maker=lambda nets, size, draw: _doubled(_hunyuan_inputs(nets.nets[0], size, draw), size, draw),
    ),
    Case("controlnet_qwen", _qwen, multiple=2, maker=_qwen_inputs),
    Case(
        "controlnets_qwen",
        lambda: diffusers.QwenImageMultiControlNetModel([_qwen()]),
        multiple=2,
        maker=lambda nets, size, draw: _doubled(_qwen_inputs(nets.nets[0], size, draw), size, draw),
    ),
    Case("controlnet_sana", _sana, maker=_sana_inputs),
    *([Case("controlnet_cosmos", _cosmos, multiple=2, frames=3, maker=_cosmos_inputs)] * is_torchvision_available()),
    Case("controlnet_z_image", lambda: _z_image(None), multiple=2, maker=_z_image_inputs),
    Case("controlnet_z_image_layers", lambda: _z_image("control_layers"), multiple=2, maker=_z_image_inputs),
    Case("controlnet_z_image_refiner", lambda: _z_image("control_noise_refiner"), multiple=2, maker=_z_image_inputs),
)

LEFT_OUT: dict[str, str] = {
    **({"CosmosControlNetModel": "it cannot be called without torchvision"} if not is_torchvision_available() else {}),
}
