"""Denoisers of molecules: tokens, and features of each pair of tokens."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from ..case import Case
from ..inputs import Draw, Size


def _proteina() -> nn.Module:
    return diffusers.RFD4ProteinaTransformer(
        nlayers=3,
        token_dim=32,
        nheads=2,
        dim_cond=16,
        pair_repr_dim=12,
        latent_dim=8,
        token_type_emb_dim=8,
        t_emb_dim=16,
        xt_pair_dist_dim=8,
        feats_seq=("xt_bb_ca", "xt_local_latents", "token_type"),
        feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents", "recycle_remaining"),
        feats_pair_repr=("xt_bb_ca_pair_dists", "molecule_idx_pair", "molecule_entity_pair", "token_bond_path_length"),
        tri_mult_c=8,
        num_sequence_classes=10,
    )


def _proteina_inputs(transformer: Any, size: Size, draw: Draw) -> dict[str, Any]:
    """A chain of `rows` tokens of two molecules, padded at the end; it passes the layers twice."""
    batch, length = size.batch, size.rows
    molecule = (torch.arange(length) >= length // 2).to(torch.int64).expand(batch, -1).to(draw.device)
    return {
        "bb_ca": draw.normal(batch, length, 3),
        "local_latents": draw.normal(batch, length, transformer.config.latent_dim),
        "bb_ca_time": draw.full(0.3, batch),
        "local_latents_time": draw.full(0.2, batch),
        "padding_mask": draw.mask(batch, length, torch.bool),
        "token_type": draw.integers(transformer.config.num_token_types, batch, length),
        "conditioning": {
            "is_in_context_conditioning": draw.integers(2, batch, length).bool(),
            "supports_local_latent": draw.integers(2, batch, length).bool(),
            "molecule_iid": molecule,
            "molecule_entity_id": molecule,
            "token_bond_path_length": draw.integers(6, batch, length, length),
        },
        "recycle_depth": 2,
    }


CASES: tuple[Case, ...] = (Case("rfd4_proteina", _proteina, maker=_proteina_inputs),)

LEFT_OUT: dict[str, str] = {}
