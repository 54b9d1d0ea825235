"""Weights that rank 0 sends: what ranks compare, and what is made of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxpass.runtime.sent_weights import difference, listed, send, slots_of

HERE = torch.device("cpu")


class Own(nn.Parameter):
    """As packages for quantisation have them."""


class Model(nn.Module):
    """Tied weights, a buffer, another layout of memory, tensors that are neither parameters nor buffers."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(size, 4, 3)
        self.conv.weight.data = self.conv.weight.data.contiguous(memory_format=torch.channels_last)
        self.table = nn.Embedding(5, 4, dtype=torch.bfloat16)
        self.head = nn.Linear(4, 5, bias=False, dtype=torch.bfloat16)
        self.head.weight = self.table.weight
        self.register_buffer("scale", torch.rand(()), persistent=False)
        self.register_buffer("mask", torch.rand(2, 4) > 0.5)
        self.angles = torch.rand(3)
        self.others: list[Any] = [torch.rand(2), "text"]
        self.empty = nn.Parameter(torch.empty(0, 4), requires_grad=False)


def on_meta(size: int = 3) -> Model:
    with torch.device("meta"):
        return Model(size)


def exchanged(first: nn.Module, other: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Send the weights of one module to the other; returns what was sent, and what was taken."""
    slots = [slots_of({"unet": each}) for each in (first, other)]
    listings = [listed(each) for each in slots]
    assert not difference(listings)
    sent: list[Tensor] = []
    send(slots[0], listings, 0, HERE, lambda tensor: sent.append(tensor.clone()))
    coming = iter(sent)
    taken: list[Tensor] = []

    def take(tensor: Tensor) -> None:
        tensor.copy_(next(coming))
        taken.append(tensor)

    send(slots[1], listings, 1, HERE, take)
    return sent, taken


@pytest.mark.parametrize("make", [on_meta, Model])
def test_all_tensors_come_tied_ones_once_in_their_layout(make: Callable[[], Model]) -> None:
    first: Any = Model()
    other: Any = make()
    assert len(exchanged(first, other)[0]) == len(first.state_dict()) - 1 + 3  # tied; the scale, angles and others
    for name, value in first.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
        assert other.state_dict()[name].stride() == value.stride()
    assert torch.equal(other.scale, first.scale)
    assert torch.equal(other.angles, first.angles)
    assert torch.equal(other.others[0], first.others[0])
    assert other.head.weight is other.table.weight
    assert isinstance(other.conv.weight, nn.Parameter)
    assert not other.empty.requires_grad


def test_weights_that_only_the_other_rank_ties_come_apart() -> None:
    first: Any = Model()
    other: Any = on_meta()
    first.head.weight = nn.Parameter(first.head.weight + 1)
    exchanged(first, other)
    assert torch.equal(other.head.weight, first.head.weight)
    assert torch.equal(other.table.weight, first.table.weight)


def test_what_a_rank_has_noted_down_while_it_ran_may_differ() -> None:
    first: Any = Model()
    other: Any = on_meta()
    first.cache, other.cached = torch.ones(3), torch.ones(2)
    exchanged(first, other)
    assert not hasattr(other, "cache")


def without(name: str) -> Callable[[Model], None]:
    return lambda model: delattr(model, name)


def put(name: str, value: Any) -> Callable[[Model], None]:
    return lambda model: setattr(model, name, value)


@pytest.mark.parametrize(
    ("first", "other", "words"),
    [
        (lambda m: None, lambda m: m.conv.half(), r"rank 1 has float16 \(4, 3, 3, 3\) for the weight unet.conv.weight, "
         r"rank 0 has float32 \(4, 3, 3, 3\); build the model on all ranks with the same configuration and dtype"),
        (lambda m: None, put("head", None), "rank 1 has none for the weight unet.head.weight, rank 0 has bfloat16"),
        (without("mask"), lambda m: None, r"rank 1 has bool \(2, 4\) for the weight unet.mask, rank 0 has none"),
        (lambda m: m.conv.to("meta"), lambda m: None, "rank 0, which sends the weights, has no values for unet.conv"),
        (put("angles", None), lambda m: None, "for the weight unet.angles, rank 0 has none"),
        (put("angles", torch.ones(3).to_sparse()), lambda m: None,
         "rank 1 has no values for unet.angles, and those of rank 0 are not sent; load such weights on every rank"),
        (lambda m: None, put("empty", Own(torch.ones(1))), "unet.empty of rank 1 is a Own"),
    ],
)  # fmt: skip
def test_differences_are_named(first: Callable[[Any], Any], other: Callable[[Any], Any], words: str) -> None:
    models = [Model(), on_meta()]
    for change, model in zip((first, other), models, strict=True):
        change(model)
    found = difference([listed(slots_of({"unet": each})) for each in models])
    assert re.search(words, found), found
