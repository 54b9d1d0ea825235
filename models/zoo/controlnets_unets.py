"""ControlNets of UNets: residuals of control images."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from ..case import Case
from ..inputs import Draw, Size

_blocks: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
}
_levels: dict[str, Any] = _blocks | {"layers_per_block": 1, "attention_head_dim": 4}
_hint_channels = (8, 8, 16)


def _audible(net: Any) -> Any:
    """Scale up the hint's embedding: torch's initialisation shrinks it at each layer."""
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
    """Two control images, of kinds 0 and 3."""
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
    """A small UNet beside the large one; they exchange features after every block."""
    return diffusers.UNetControlNetXSModel(
        **_blocks,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),  # pyright: ignore[reportArgumentType]
        num_attention_heads=2,
        ctrl_conditioning_embedding_out_channels=_hint_channels,  # pyright: ignore[reportArgumentType]
        ctrl_block_out_channels=(8, 16),  # pyright: ignore[reportArgumentType]
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
    """Only the shape of the sample is read; only the first frame is given."""
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
)

LEFT_OUT: dict[str, str] = {
    "ControlNetXSAdapter": "weights for UNetControlNetXSModel, whose case has them; not callable by itself",
    "SparseControlNetConditioningEmbedding": "the first layers of SparseControlNetModel, which has a case",
}
