"""What a rule cannot split is split through the operators that it consists of, or gathered with the rule's reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxpass.ir.layout import Layout
from tests.passes.examples import randn
from tests.passes.harness import cut, split

FILTER = randn(2, 2, 1, 1)
WINDOW = torch.ones(4, dtype=torch.float64)


def frames(x: Tensor) -> Tensor:
    options: dict[str, Any] = {"window": WINDOW, "center": False, "return_complex": True, "align_to_window": True}
    return torch.stft(x, 4, 2, **options).abs()


def filtered_by_input(x: Tensor) -> Tensor:
    return F.conv2d(torch.ones(1, 3, 8, 8, dtype=x.dtype), x)


def counted(x: Tensor) -> Tensor:
    return torch.zeros(2, 6, dtype=x.dtype).scatter_add(0, (x > 0).long(), x)


def strided(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, ::2] = x[:, 1::2] * 2
    return y


def written_by_mask(x: Tensor) -> Tensor:
    y = x.clone()
    y[torch.tensor([True, False, True, False])] = x[:2] * 2
    return y


Case = tuple[Callable[[Tensor], Tensor], tuple[int, ...], Layout]

GATHERED: dict[str, Case] = {
    "its index is boolean": (written_by_mask, (4, 6), cut(1, (0, 3), (3, 6))),
    "it works on the flattened tensor": (lambda x: x + x.argmax(), (4, 6), cut(0, (0, 2), (2, 4))),
    "align_to_window is set": (frames, (2, 16), cut(1, (0, 8), (8, 16))),
    "its padding along the split dim 2 is negative": (
        lambda x: F.pad(x, (-1, 2), mode="reflect"), (2, 2, 6), cut(2, (0, 3), (3, 6)),
    ),
    "the (real, imaginary) dim is split": (
        lambda x: torch.view_as_complex(x).abs(), (3, 4, 2), cut(2, (0, 1), (1, 2)),
    ),
    "the windows of one rank would read nothing but padding": (
        lambda x: F.conv2d(x, FILTER, padding=(6, 0)), (1, 2, 4, 3), cut(2, [0, 2], [1], [3]),
    ),
    "the weight of a convolution is split": (filtered_by_input, (4, 3, 3, 3), cut(0, (0, 2), (2, 4))),
    "fewer rows than ranks along dim 0": (counted, (6, 6), cut(0, (0, 2), (2, 4), (4, 6))),
}  # fmt: skip

IN_PARTS: dict[str, Case] = {
    "attention of one token, cut along its channels": (
        lambda x: F.scaled_dot_product_attention(x, x, x), (2, 1, 8), cut(2, (0, 4), (4, 8)),
    ),
    "patches of an image without a batch dim": (lambda x: F.unfold(x, 2), (2, 6, 5), cut(1, (0, 3), (3, 6))),
    "a sum of patches without a batch dim": (lambda x: F.fold(x, (4, 4), 2), (8, 9), cut(1, (0, 4), (4, 9))),
    "a norm of order 3": (
        lambda x: x / torch.linalg.vector_norm(x, 3, 0, keepdim=True), (6, 4), cut(0, (0, 3), (3, 6)),
    ),
    "every second row is replaced": (strided, (2, 6, 4), cut(1, (0, 3), (3, 6))),
}  # fmt: skip


def reasons(case: Case) -> list[str]:
    """The reason of each fallback, after a check of all values."""
    function, shape, layout = case
    return split(function, [randn(*shape)], {0: layout}, len(layout.rows), exact=False).fallbacks


@pytest.mark.parametrize("reason", GATHERED)
def test_what_a_rule_refuses_is_gathered_with_its_reason(reason: str) -> None:
    found = reasons(GATHERED[reason])
    assert found
    assert all(each.endswith(reason) for each in found)


@pytest.mark.parametrize("name", IN_PARTS)
def test_what_a_rule_refuses_is_split_in_parts_where_these_can_be_split(name: str) -> None:
    assert reasons(IN_PARTS[name]) == []
