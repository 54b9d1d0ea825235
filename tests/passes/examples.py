"""Examples of rules: a function, its inputs, and the dims of each input along which its rule promises a split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from fxpass.ir.layout import Layout
from tests.passes.harness import Split, layouts, split


class Example:
    """`promised[i]` are the dims of input i along which it may be cut, by itself, without a fallback."""

    def __init__(
        self,
        function: Callable[..., Any],
        inputs: Sequence[Any],
        promised: Mapping[int, Sequence[int]] | None = None,
        title: str = "",
    ) -> None:
        self.function = function
        self.inputs = inputs
        self.promised = promised or {}
        self.title = title

    def __repr__(self) -> str:
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else x for x in self.inputs]
        title = self.title or (str(self.function) if isinstance(self.function, nn.Module) else "")
        return f"Example({title}, {shapes}, {dict(self.promised)})"


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def split_where_promised(
    data: st.DataObject, example: Example, *, kinds: str = "uneven overlapping strided any"
) -> Split:
    """Cut one input along one promised dim: right, and no fallback."""
    tensors = [x for x in example.inputs if isinstance(x, Tensor)]
    places = [(i, d) for i, dims in example.promised.items() for d in dims if tensors[i].shape[d] > 1]
    place, dim = data.draw(st.sampled_from(places), label="cut (input, dim)")
    size = tensors[place].shape[dim]
    world = data.draw(st.integers(2, min(4, size)), label="world")
    layout = data.draw(layouts(tensors[place].shape, world, dims=[dim], kinds=kinds), label="layout")
    return split(example.function, example.inputs, {place: layout}, world)


def split_anywhere(data: st.DataObject, example: Example) -> Split:
    """Cut all inputs along any dims: right, by whatever means."""
    tensors = [x for x in example.inputs if isinstance(x, Tensor)]
    world = data.draw(st.integers(1, 4), label="world")
    cuts: dict[int, Layout] = {}
    for i, x in enumerate(tensors):
        if any(n > 1 for n in x.shape) and data.draw(st.booleans()):
            cuts[i] = data.draw(layouts(x.shape, world, fewest=2), label=f"cut of input {i}")
    return split(example.function, example.inputs, cuts, world, exact=False)
