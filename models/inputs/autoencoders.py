"""Inputs of the halves of autoencoders: a latent of images, videos or audio, or an image."""

from __future__ import annotations

from typing import Any

from ..wrappers import Decode, Encode
from .draw import Draw, Maker, Size

#: dims of the latent after batch and channels, if they are not rows and columns
VIDEOS = {
    "AutoencoderKLWan",
    "AutoencoderKLQwenImage",
    "AutoencoderKLHunyuanVideo",
    "AutoencoderKLCogVideoX",
    "AutoencoderKLLTXVideo",
    "AutoencoderKLMochi",
    "AutoencoderKLAllegro",
}
SOUND = {"AutoencoderOobleck"}
CHANNELS = ("latent_channels", "z_dim", "decoder_input_channels")  #: names in configurations


def _decode(decode: Decode, size: Size, draw: Draw) -> dict[str, Any]:
    config, name = decode.vae.config, type(decode.vae).__name__
    channels = next(config[key] for key in CHANNELS if key in config)
    extents = (size.rows,) if name in SOUND else (size.rows, size.cols)
    extents = (size.frames, *extents) if name in VIDEOS else extents
    if name == "AutoencoderKLTemporalDecoder":  # frames are in the batch; an argument says how many make a video
        return {"latent": draw.normal(size.batch * size.frames, channels, *extents), "num_frames": size.frames}
    return {"latent": draw.normal(size.batch, channels, *extents)}


def _encode(encode: Encode, size: Size, draw: Draw) -> dict[str, Any]:
    config = encode.vae.config
    scale = 2 ** (len(config.block_out_channels) - 1)
    return {"sample": draw.normal(size.batch, config.in_channels, size.rows * scale, size.cols * scale)}


MAKERS: dict[str, Maker] = {"Decode": _decode, "Encode": _encode}
