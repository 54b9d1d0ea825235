"""ControlNets: what a control picture adds to a denoiser."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.utils import is_torchvision_available
from torch import nn

from ..case import Case
from ..draw import Draw, Size
from ..inputs import example_inputs

_blocks: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
}
_levels: dict[str, Any] = _blocks | {"layers_per_block": 1, "attention_head_dim": 4}
_hint_channels = (8, 8, 16)


def _audible(net: Any) -> Any:
    """Torch's initialisation shrinks the hint at each layer of its embedding."""
    for name, parameter in net.named_parameters():
        if "cond_embedding" in name and name.endswith("weight"):
            parameter.data.mul_(3)
    return net


def _controlnet(**options: Any) -> Any:
    return _audible(diffusers.ControlNetModel(**_levels, conditioning_embedding_out_channels=_hint_channels, **options))


def _sample(net: Any, size: Size, draw: Draw) -> dict[str, Any]:
    return {
        "sample": draw.normal(size.batch, net.config.in_channels, size.rows, size.cols),
        "timestep": draw.full(321, dtype=torch.int64),
        "encoder_hidden_states": draw.normal(size.batch, size.tokens(77), net.config.cross_attention_dim),
    }


def _picture(size: Size, draw: Draw) -> torch.Tensor:
    scale = 2 ** (len(_hint_channels) - 1)
    return draw.normal(size.batch, 3, size.rows * scale, size.cols * scale)


def _pooled(net: Any, size: Size, draw: Draw) -> dict[str, Any]:
    return {"guess_mode": True, "conditioning_scale": 0.8}


def _several(nets: Any, size: Size, draw: Draw) -> dict[str, Any]:
    pictures = [_picture(size, draw) for _ in nets.nets]
    inputs = _sample(nets.nets[0], size, draw)
    return inputs | {"controlnet_cond": pictures, "conditioning_scale": [0.7, 1.2], "return_dict": False}


# ------------------------------------------------------------------------------------------------ union of kinds


def _union() -> Any:
    return _audible(
        diffusers.ControlNetUnionModel(
            **_levels,
            conditioning_embedding_out_channels=_hint_channels,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 20,
            num_trans_channel=16,
            num_trans_head=2,
            num_trans_layer=1,
            num_proj_channel=16,
            num_control_type=6,
        )
    )


def _kinds(net: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """Two pictures of the kinds 0 and 3."""
    kinds = torch.zeros(size.batch, net.config.num_control_type)
    kinds[:, [0, 3]] = 1
    added = {"text_embeds": draw.normal(size.batch, 20), "time_ids": draw.normal(size.batch, 6)}
    return _sample(net, size, draw) | {
        "controlnet_cond": [_picture(size, draw), _picture(size, draw)],
        "control_type": kinds.to(draw.device, draw.dtype),
        "control_type_idx": [0, 3],
        "conditioning_scale": [0.7, 1.2],
        "added_cond_kwargs": added,
    }


def _several_kinds(nets: Any, size: Size, draw: Draw) -> dict[str, Any]:
    one = _kinds(nets.nets[0], size, draw)
    several = ("controlnet_cond", "control_type", "control_type_idx")
    return one | {key: [one[key]] * 2 for key in several} | {"conditioning_scale": [0.7, 1.2], "return_dict": False}


def _unions() -> nn.Module:
    from diffusers.models.controlnets import MultiControlNetUnionModel

    return MultiControlNetUnionModel([_union(), _union()])


# ------------------------------------------------------------------------------------------------ beside UNets


def _xs(**options: Any) -> nn.Module:
    """A small UNet beside the large one; they look at each other after every block."""
    return diffusers.UNetControlNetXSModel(
        **_blocks,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        num_attention_heads=2,
        ctrl_conditioning_embedding_out_channels=_hint_channels,
        ctrl_block_out_channels=(8, 16),
        ctrl_num_attention_heads=2,
        ctrl_max_norm_num_groups=4,
        **options,
    )


def _beside(net: Any, size: Size, draw: Draw) -> dict[str, Any]:
    width = net.config.cross_attention_dim
    return {
        "sample": draw.normal(size.batch, 4, size.rows, size.cols),
        "timestep": draw.full(321, dtype=torch.int64),
        "encoder_hidden_states": draw.normal(size.batch, size.tokens(77), width),
        "controlnet_cond": _picture(size, draw),
        "conditioning_scale": 0.8,
    }


def _sparse(**options: Any) -> Any:
    net = diffusers.SparseControlNetModel(
        **_levels | {"down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion")},
        conditioning_embedding_out_channels=_hint_channels,
        motion_max_seq_length=8,
        motion_num_attention_heads=2,
        **options,
    )
    return _audible(net)


def _some_frames(net: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """The sample is not looked at, but for its shape; only the first frame is given."""
    config = net.config
    scale = 1 if config.use_simplified_condition_embedding else 2 ** (len(_hint_channels) - 1)
    shape = (size.frames, size.rows * scale, size.cols * scale)
    mask = torch.zeros(size.batch, 1, *shape)
    mask[:, :, 0] = 1
    return {
        "sample": draw.normal(size.batch, config.in_channels, size.frames, size.rows, size.cols),
        "timestep": draw.full(321, dtype=torch.int64),
        "encoder_hidden_states": draw.normal(size.batch * size.frames, size.tokens(77), config.cross_attention_dim),
        "controlnet_cond": draw.normal(size.batch, config.conditioning_channels, *shape),
        "conditioning_mask": mask.to(draw.device, draw.dtype),
    }


# ------------------------------------------------------------------------------------------------ transformers


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
    """The same with two control pictures."""
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
    """Those of the transformer, and the control picture."""
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
    """The control latent has fewer channels than the model makes room for."""
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
    """It shares its embeddings with the transformer that it serves."""
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
    Case("controlnet_guess", _controlnet, extra=_pooled),
    Case("controlnet_pooled", lambda: _controlnet(global_pool_conditions=True)),
    Case("controlnets", lambda: diffusers.MultiControlNetModel([_controlnet(), _controlnet()]), maker=_several),
    Case("controlnet_union", _union, maker=_kinds),
    Case("controlnet_unions", _unions, maker=_several_kinds),
    Case("controlnet_xs", _xs, multiple=2, maker=_beside),
    Case(
        "controlnet_xs_time",
        lambda: _xs(ctrl_learn_time_embedding=True, time_embedding_mix=0.4),
        multiple=2,
        maker=_beside,
    ),
    Case("controlnet_sparse", _sparse, frames=3, maker=_some_frames),
    Case(
        "controlnet_sparse_rgb",
        lambda: _sparse(use_simplified_condition_embedding=False, conditioning_channels=3),
        frames=3,
        maker=_some_frames,
    ),
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
    "ControlNetXSAdapter": "weights to be put into UNetControlNetXSModel, which has them in its case; not callable",
    "SparseControlNetConditioningEmbedding": "the first layers of SparseControlNetModel, which has a case",
    **({"CosmosControlNetModel": "it cannot be called without torchvision"} if not is_torchvision_available() else {}),
}
