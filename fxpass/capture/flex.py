"""Rewrite flex_attention into operators that have rules.

The functions that modify scores and masks depend on positions only. They are evaluated for all positions, as in torch's
eager implementation, which also uses a mask's function and not its blocks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.flex_attention import flex_attention as operator
from torch._higher_order_ops.flex_attention import math_attention
from torch.nn.attention.flex_attention import _identity, _vmap_for_bhqkv, noop_mask

__all__ = ["attention", "operator"]


def attention(
    query: Tensor, key: Tensor, value: Tensor, score_mod: Any, block_mask: Any, scale: float, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, logsumexp and maxima; the last two are dropped from a program that does not use them."""
    result = math_attention(query, key, value, score_mod, block_mask, scale, *rest)
    if score_mod is not _identity:
        return result
    mask = None if block_mask[-1] is noop_mask else _mask(query, key, block_mask[-1], *rest[2:])
    grouped = query.shape[1] != key.shape[1]
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return output, *result[1:]


def _mask(query: Tensor, key: Tensor, mask_mod: Any, buffers: tuple[Any, ...] = ()) -> Tensor:
    """The boolean mask of the keys that each query sees, of size 1 along samples or heads that share it."""
    # imported here: Dynamo takes as long to import as torch
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    sizes = (*query.shape[:3], key.shape[2])
    positions = [torch.arange(size, device=query.device) for size in sizes]
    with TransformGetItemToIndex():
        mask = _vmap_for_bhqkv(mask_mod, prefix=(), suffix=(None,) * len(buffers))(*positions, *buffers)
    for dim in (0, 1):
        mask = mask.narrow(dim, 0, 1) if mask.stride(dim) == 0 else mask
    return mask
