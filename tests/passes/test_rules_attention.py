"""Attention against law 1, and operators that no rule knows."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.passes.examples import Example, randn, split_anywhere, split_where_promised
from tests.passes.harness import evenly, layouts, split
from tests.properties import examples, few, given

# -- attention -------------------------------------------------------------------------------------------------------


@st.composite
def attentions(draw: st.DrawFn) -> Example:
    b, h, length, e = 2, 4, draw(st.integers(4, 6)), 3
    cross = draw(st.booleans())
    keys = draw(st.integers(4, 6)) if cross else length
    grouped = draw(st.booleans())
    heads = 2 if grouped else draw(st.sampled_from([h, h, 1]))
    named: dict[str, Any] = {"enable_gqa": grouped, "scale": draw(st.none() | st.just(0.3))}
    inputs = [randn(b, h, length, e), randn(b, heads, keys, e), randn(b, heads, keys, draw(st.sampled_from([e, 5])))]
    kind = draw(st.sampled_from(["none", "causal", "bool", "float"]))
    if kind == "causal":
        named["is_causal"] = True
    if kind in ("bool", "float"):
        full = (b, h, length, keys)
        ndim = draw(st.integers(2, 4))
        shape = [n if draw(st.booleans()) else 1 for n in full[4 - ndim :]]
        mask = randn(*shape)
        if kind == "bool":
            mask = mask > -1
            mask[..., 0] = True
        inputs.append(mask)

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, **named)

    promised = {0: (0, 1, 2, 3), 1: (0, 1, 2), 2: (0, 1, 2)}
    return Example(function, inputs, promised, title=f"{kind} {named}")


@examples(100)
@given(attentions(), st.data())
def test_attention_is_split_along_samples_heads_and_tokens(example: Example, data: st.DataObject) -> None:
    split_where_promised(data, example)


@examples(100)
@given(attentions(), st.data())
def test_attention_is_right_on_any_cut(example: Example, data: st.DataObject) -> None:
    split_anywhere(data, example)


@examples(40)
@given(attentions(), st.data())
def test_queries_and_keys_may_be_cut_differently(example: Example, data: st.DataObject) -> None:
    world = data.draw(st.integers(2, 4))
    q, k, v = (data.draw(layouts(x.shape, world, dims=[2])) for x in example.inputs[:3])
    result = split(example.function, example.inputs, {0: q, 1: k, 2: v}, world)
    assert set(result.roles) <= {"keys_values", "output"}


@few
@given(data=st.data())
def test_attention_without_a_batch_is_split(data: st.DataObject) -> None:
    split_where_promised(
        data, Example(F.scaled_dot_product_attention, [randn(5, 3), randn(6, 3), randn(6, 3)], {0: (0,), 1: (0,)})
    )


@few
@given(data=st.data())
def test_rotary_embedding_in_complex_numbers_is_split(data: st.DataObject) -> None:
    def rope(x: Tensor, angles: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(2, 7, 3, 4, 2))
        turn = torch.polar(torch.ones_like(angles), angles)[None, :, None]
        return torch.view_as_real(pairs * turn).flatten(3)

    result = split_where_promised(data, Example(rope, [randn(2, 7, 3, 8), randn(7, 4)], {0: (0, 1, 2), 1: (0,)}))
    assert set(result.roles) <= {"output"}


@few
@given(data=st.data())
def test_rotary_embedding_in_halves_is_split(data: st.DataObject) -> None:
    def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * cos + torch.cat([-right, left], -1) * sin + torch.stack([-b, a], -1).flatten(-2) * sin

    result = split_where_promised(data, Example(rope, [randn(2, 3, 7, 8), randn(7, 8), randn(7, 8)], {0: (0, 1, 2)}))
    assert set(result.roles) <= {"output"}


# -- layers of torch -------------------------------------------------------------------------------------------------


def layers() -> dict[str, Example]:
    """What models are made of that do not write their own attention: [B, L, 8], most of them with text [B, 5, 8]."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
    first = nn.MultiheadAttention(8, 2).double()
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double().eval()
    decoder = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True, norm_first=True).double()
    causal = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
    x, text = randn(2, 7, 8), randn(2, 5, 8)
    return {
        "attention": Example(lambda x: attention(x, x, x, need_weights=False)[0], [x], {0: (0, 1)}),
        "attention with its weights": Example(lambda x: list(attention(x, x, x)), [x], {0: (0, 1)}),
        "attention to text": Example(lambda x, y: attention(x, y, y)[0], [x, text], {0: (0, 1), 1: (0, 1)}),
        "attention, tokens first": Example(lambda x: first(x, x, x)[0], [randn(7, 2, 8)], {0: (0, 1)}),
        "encoder": Example(nn.TransformerEncoder(encoder, 2).double(), [x], {0: (0, 1)}),
        "encoder with a mask": Example(partial(encoder, src_mask=causal, is_causal=True), [x], {0: (0, 1)}),
        "decoder": Example(decoder, [x, text], {0: (0, 1), 1: (0, 1)}),
    }


@pytest.mark.parametrize("name", layers())
@few
@given(data=st.data())
def test_layers_of_torch_are_split_along_samples_and_tokens(name: str, data: st.DataObject) -> None:
    split_where_promised(data, layers()[name])


# -- what no rule knows ----------------------------------------------------------------------------------------------


@few
@given(data=st.data())
def test_an_unknown_operator_gets_whole_operands_and_a_reason(data: st.DataObject) -> None:
    x = randn(5, 5)
    assert split(lambda x: x.digamma(), [x], {0: evenly(0, 5, 2)}, 2, exact=False).fallbacks == [
        "no rule for aten.digamma.default"
    ]
    split_anywhere(
        data, Example(lambda x, y: (torch.cdist(x, y), x.median(), x.aminmax(), x.tril() + y), [x, randn(5, 5)])
    )
