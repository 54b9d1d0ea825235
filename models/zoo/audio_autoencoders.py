"""Autoencoders and vocoders of sounds, and those of molecules: one-dim sequences, whose length is `rows`."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

from ..case import Case
from ..inputs import Draw, Size
from .halves import Sounds, halves


def _oobleck() -> nn.Module:
    return diffusers.AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 3],
        channel_multiples=[1, 2],
        decoder_channels=8,
        decoder_input_channels=4,
    )


def _kvae() -> nn.Module:
    return diffusers.AutoencoderKLKVAEAudio(
        encoder_dim=4,
        encoder_rates=[2, 3],
        latent_dim=16,
        codebook_dim=4,
        decoder_dim=16,
        decoder_rates=[3, 2],
        attn_num_heads=2,
    )


def _minimax() -> nn.Module:
    return diffusers.AutoencoderKLMiniMaxH3Audio(
        encoder_dim=4,
        encoder_rates=(2, 2),
        latent_dim=16,
        latent_channels=4,
        num_attention_heads=2,
        decoder_dim=16,
        decoder_rates=(2, 2),
        decoder_kernel_sizes=(4, 4),
        resblock_kernel_sizes=(3, 5),
        resblock_dilation_sizes=((1, 3), (1, 3)),
    )


def _longcat() -> nn.Module:
    return diffusers.LongCatAudioDiTVae(
        channels=8, c_mults=[1, 2], strides=[2, 4], latent_dim=4, encoder_latent_dim=8, downsampling_ratio=8
    )


def _same() -> nn.Module:
    return diffusers.AutoencoderSAME(
        patch_size=2,
        encoder_channels=8,
        encoder_c_mults=(2,),
        encoder_strides=(4,),
        encoder_transformer_depths=(2,),
        latent_dim=4,
        dim_heads=8,
        decoder_sinusoidal_blocks=(2,),
    )


def _mmaudio() -> nn.Module:
    return diffusers.MMAudioVAE(
        mel_bins=8,
        latent_channels=4,
        hidden_channels=8,
        channel_multipliers=(1, 2),
        layers_per_block=1,
        n_fft=16,
        hop_length=4,
    )


def _vocoder() -> nn.Module:
    return diffusers.MMAudioVocoder(
        num_mels=8,
        upsample_initial_channel=16,
        upsample_rates=(2, 2),
        upsample_kernel_sizes=(4, 4),
        resblock_kernel_sizes=(3, 5),
        resblock_dilation_sizes=((1, 3), (1, 3)),
    )


def _mel(module: nn.Module, size: Size, draw: Draw) -> dict[str, Any]:
    return {"mel": draw.normal(size.batch, 8, size.rows)}


def _music() -> nn.Module:
    return diffusers.MiniMaxMusic3Vocoder(
        latent_channels=8, decoder_input_dim=8, decoder_hidden_dim=16, upsampling_ratios=(2, 3)
    )


def _flow(module: nn.Module, size: Size, draw: Draw) -> dict[str, Any]:
    return {"latents": draw.normal(size.batch, 8, size.rows)}


def _cosmos() -> nn.Module:
    return diffusers.Cosmos3AVAEAudioTokenizer(
        vocoder_input_dim=4,
        dec_dim=8,
        dec_c_mults=(1, 2),
        dec_strides=(2, 4),
        enc_dim=8,
        enc_num_blocks=1,
        enc_n_fft=8,
        enc_hop_length=2,
        enc_latent_dim=8,
        enc_c_mults=(1, 2),
        enc_strides=(2, 2),
    )


def _ltx2() -> nn.Module:
    return diffusers.AutoencoderKLLTX2Audio(
        base_channels=8, ch_mult=(1, 2), num_res_blocks=1, latent_channels=4, mel_bins=16, resolution=32
    )


class _Mono(Sounds):
    """Samples without a dim of tracks."""

    def sample(self, size: Size) -> tuple[int, ...]:
        return size.batch, size.rows * self.hop


class _Spectrograms(Sounds):
    """Rows of eight bins, and twice as many in the sample; the first row stands alone."""

    def latent(self, size: Size) -> tuple[int, ...]:
        return size.batch, self.channels, size.rows, 8

    def sample(self, size: Size) -> tuple[int, ...]:
        return size.batch, self.tracks, size.rows * self.hop - 1, 16


def _mode(module: nn.Module, size: Size, draw: Draw) -> dict[str, Any]:
    return {"sample_posterior": False}


CASES: tuple[Case, ...] = (
    *halves("oobleck", _oobleck, Sounds(4, 2, 6), covers="AutoencoderOobleck"),
    *halves("kvae_audio", _kvae, Sounds(4, 1, 6), covers="AutoencoderKLKVAEAudio"),
    *halves("vae_minimax_audio", _minimax, Sounds(4, 1, 4), covers="AutoencoderKLMiniMaxH3Audio"),
    *halves("longcat", _longcat, Sounds(4, 1, 8), covers="LongCatAudioDiTVae", encode=_mode),
    *halves("same", _same, Sounds(4, 2, 8), covers="AutoencoderSAME"),
    *halves("mmaudio", _mmaudio, _Mono(4, 1, 8), covers="MMAudioVAE"),
    Case("mmaudio_vocoder", _vocoder, text=None, maker=_mel),
    Case("minimax_music_vocoder", _music, text=None, maker=_flow),
    *halves("cosmos_audio", _cosmos, Sounds(4, 2, 8), covers="Cosmos3AVAEAudioTokenizer"),
    *halves("vae_ltx2_audio", _ltx2, _Spectrograms(4, 2, 2), covers="AutoencoderKLLTX2Audio"),
)

LEFT_OUT: dict[str, str] = {}
