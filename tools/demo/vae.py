"""The autoencoder of the demo: a fixed, nearly linear encoder, and a decoder initialised as its rough inverse.

The code of a 4x4 block of pixels is its mean colour (three numbers) and a diagonal luminance difference (one). Writing
that code into an `AutoencoderKL` by hand saves most of the training: only the decoder must learn to sharpen.

Group norm would remove the brightness of flat images. So every residual stream carries constants of alternating sign
and size k: they dominate the norm's statistics, and with weight k and bias -+k the norm is nearly the identity for
everything else. Each number x is stored as a pair +x, -x, because silu(x) - silu(-x) = x.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

GAIN = 2.0  # of the luminance difference
HOME = {0: (0, 1), 2: (0, -1), 1: (1, 1), 3: (1, -1), 4: (2, 1), 6: (2, -1), 5: (3, 1), 7: (3, -1)}
"""Channel of a stream -> (which number of the code it carries, with which sign)."""


def make_vae() -> AutoencoderKL:
    """Images [B, 3, H, W] in -1..1 to latents [B, 4, H/4, W/4] and back, initialised as described above."""
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64),  # pyright: ignore[reportArgumentType]
        down_block_types=("DownEncoderBlock2D",) * 3,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * 3,  # pyright: ignore[reportArgumentType]
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=128,
        scaling_factor=1.7,
    )
    with torch.no_grad():
        _write_code(vae.encoder, k=8.0, rest=0.0)
        _write_code(vae.decoder, k=3.0, rest=0.3)
        moments = _biased(vae.encoder.conv_out)
        moments[0][4:] = 0
        moments[1][4:] = -12  # log-variance of the posterior: practically none
        down, _ = _biased(vae.encoder.get_submodule("down_blocks.1.downsamplers.0.conv"))
        for channel, (number, sign) in HOME.items():
            for source, (colour, source_sign) in HOME.items():
                if number == 3 and colour < 3:
                    down[channel, source, 0, 0] = GAIN * sign * source_sign / 6
                    down[channel, source, 1, 1] = -GAIN * sign * source_sign / 6
        for weight, bias in map(_biased, (vae.quant_conv, vae.post_quant_conv)):
            weight.copy_(torch.eye(len(bias))[:, :, None, None])
            bias.zero_()
    return vae


def code(pictures: Tensor) -> Tensor:
    """What the encoder computes (to within its norm's small curvature): [B, 3, H, W] to [B, 4, H/4, W/4]."""
    half = F.avg_pool2d(pictures.mean(1, keepdim=True), 2)
    return torch.cat([F.avg_pool2d(pictures, 4), GAIN * (half[..., ::2, ::2] - half[..., 1::2, 1::2])], 1)


def _biased(layer: nn.Module | None) -> tuple[Tensor, Tensor]:
    """The weight and the bias of a layer that has both."""
    assert isinstance(layer, (nn.Conv2d, nn.Linear))
    assert layer.bias is not None
    return layer.weight, layer.bias


def _signs(channels: int) -> Tensor:
    return 1 - 2.0 * (torch.arange(channels) % 2)


def _write_code(side: nn.Module, k: float, rest: float) -> None:
    """Initialise an encoder or a decoder to carry the code; `rest` scales the other, random weights."""
    for name, part in side.named_modules():
        if isinstance(part, nn.GroupNorm):
            part.weight.fill_(k)
            part.bias.copy_(-k * _signs(len(part.bias)))
        if not isinstance(part, nn.Conv2d):
            continue
        weight, bias = _biased(part)
        stream = name.endswith(("shortcut", "samplers.0.conv"))
        bias.zero_()
        weight.mul_(1 if name.endswith("conv1") else rest)
        if name.endswith(("conv_in", "conv1")) or stream:
            bias.copy_(k * _signs(len(bias)))
        if stream:  # blind to the constants
            signs = _signs(weight.shape[1]).view(1, -1, 1, 1)
            weight.sub_(signs * (weight * signs).mean(1, keepdim=True))
        if name.endswith("conv2") or stream or name == "conv_in":
            weight[: len(HOME)] = 0
        for channel, (number, sign) in HOME.items():
            if name == "conv_in" and number < weight.shape[1]:
                weight[channel, number, 1, 1] = sign
            elif name == "conv_out":
                weight[:4, channel] = 0
                if number < min(len(weight), 4):
                    weight[number, channel, 1, 1] = sign
            elif stream:
                bias[channel] = 0
                if "shortcut" in name:
                    weight[channel, channel] = 1
                elif "down" in name:
                    weight[channel, channel, :2, :2] = 0.25
                else:
                    weight[channel, channel, 1, 1] = 1
    weight, bias = _biased(side.get_submodule("mid_block.attentions.0.to_out.0"))
    weight.mul_(rest)
    bias.zero_()
