"""The measured models: a UNet and a multi-modal DiT of about 100 M parameters, with inputs of one denoising step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def unet() -> tuple[nn.Module, dict[str, Any]]:
    """About 90 M parameters, 128x128 latent, batch 1; attention at the two lower levels."""
    from diffusers import UNet2DConditionModel

    levels: Any = {
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (4, 4, 8),
    }
    model = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(128, 256, 512),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=768,
        use_linear_projection=True,
        **levels,
    )
    inputs = {
        "sample": torch.randn(1, 4, 128, 128),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(1, 77, 768),
    }
    return model, inputs


def mmdit() -> tuple[nn.Module, dict[str, Any]]:
    """About 120 M parameters, 1,024 image and 64 text tokens, batch 1."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=64,
        num_layers=4,
        num_single_layers=10,
        attention_head_dim=64,
        num_attention_heads=10,
        joint_attention_dim=512,
        pooled_projection_dim=256,
        axes_dims_rope=(16, 24, 24),
        guidance_embeds=False,
    )
    ids = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(32.0), torch.arange(32.0), indexing="ij"), -1)
    inputs = {
        "hidden_states": torch.randn(1, 1024, 64),
        "encoder_hidden_states": torch.randn(1, 64, 512),
        "pooled_projections": torch.randn(1, 256),
        "timestep": torch.tensor([0.5]),
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(64, 3),
    }
    return model, inputs


MODELS = {"unet": unet, "mmdit": mmdit}
