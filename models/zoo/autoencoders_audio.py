"""Autoencoders and vocoders of audio, and autoencoders of molecules: sequences of length `rows`."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from ..case import Case
from ..inputs import Draw, Size
from .autoencoder_halves import Sounds, halves


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
        encoder_c_mults=[2],
        encoder_strides=[4],
        encoder_transformer_depths=[2],
        latent_dim=4,
        dim_heads=8,
        decoder_sinusoidal_blocks=[2],
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
    """Samples without a dim for tracks."""

    def sample(self, size: Size) -> tuple[int, ...]:
        return size.batch, size.rows * self.hop


class _Spectrograms(Sounds):
    """Spectrograms: rows of eight bins, and twice as many in the sample; the first row is separate."""

    def latent(self, size: Size) -> tuple[int, ...]:
        return size.batch, self.channels, size.rows, 8

    def sample(self, size: Size) -> tuple[int, ...]:
        return size.batch, self.tracks, size.rows * self.hop - 1, 16


def _mode(module: nn.Module, size: Size, draw: Draw) -> dict[str, Any]:
    return {"sample_posterior": False}


def _proteina() -> nn.Module:
    kinds, residues = 3, 6
    return diffusers.RFD4ProteinaAutoencoder(
        atom37_mask=[[slot % (residue + 2) == 0 for slot in range(37)] for residue in range(residues)],
        allowed_residue_types=[[(kind + residue) % 3 > 0 for residue in range(residues)] for kind in range(kinds)],
        latent_dim=4,
        n_residue_types=residues,
        num_token_types=kinds,
        nlayers=2,
        token_dim=16,
        nheads=2,
        dim_cond=8,
        pair_repr_dim=8,
        token_type_emb_dim=4,
    )


def _molecule(size: Size, draw: Draw) -> dict[str, Any]:
    """Inputs of both halves: the mask of valid tokens, their kinds, and their features."""
    batch, tokens = size.batch, size.rows
    return {
        "padding_mask": draw.mask(batch, tokens, torch.bool),
        "token_type": draw.integers(3, batch, tokens),
        "atom37_mask": draw.integers(2, batch, tokens, 37).bool(),
        "conditioning": {
            "is_in_context_conditioning": draw.integers(8, batch, tokens) == 0,
            "supports_local_latent": draw.integers(8, batch, tokens) > 0,
        },
    }


def _atoms(module: nn.Module, size: Size, draw: Draw) -> dict[str, Any]:
    given = _molecule(size, draw)
    shape = size.batch, size.rows, 37
    given["conditioning"] |= {
        "chain_iid": draw.integers(3, size.batch, size.rows),
        "incident_bond_type_counts": draw.integers(4, *shape, 10),
        "ground_truth_element": draw.integers(20, *shape),
        "charge": draw.integers(3, *shape) - 1,
    }
    return given | {"noise": [draw.normal(size.batch, size.rows, 4)]}


def _backbone(module: nn.Module, size: Size, draw: Draw) -> dict[str, Any]:
    given = _molecule(size, draw)
    given["conditioning"] |= {"condition_sequence_1_residue": draw.integers(6, size.batch, size.rows)}
    return given | {"ca_coors_nm": draw.normal(size.batch, size.rows, 3)}


class _Molecules(Sounds):
    """Positions of the atoms of each token."""

    def latent(self, size: Size) -> tuple[int, ...]:
        return size.batch, size.rows, self.channels

    def sample(self, size: Size) -> tuple[int, ...]:
        return size.batch, size.rows, self.hop, self.tracks


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
    *halves(
        "proteina",
        _proteina,
        _Molecules(4, 3, 37),
        covers="RFD4ProteinaAutoencoder",
        decode=_backbone,
        encode=_atoms,
    ),
    *halves("vae_ltx2_audio", _ltx2, _Spectrograms(4, 2, 2), covers="AutoencoderKLLTX2Audio"),
)

LEFT_OUT: dict[str, str] = {}
