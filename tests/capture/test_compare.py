"""A program must return what the model returned: models that do something else when they are recorded are refused."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxpass.capture import Call, CaptureError, capture
from fxpass.capture.evaluate import evaluate


class Model(nn.Module):
    def __init__(self, body: Any) -> None:
        super().__init__()
        self.linear, self.body = nn.Linear(6, 6), body

    def forward(self, x: Tensor) -> Any:
        return self.body(self.linear(x))


@pytest.mark.parametrize(
    "body",
    [
        lambda x: x * 1.01 if torch.compiler.is_compiling() else x,
        lambda x: (x, x > 0.1 if torch.compiler.is_compiling() else x > 0),
        lambda x: (x, x) if torch.compiler.is_compiling() else x,
        lambda x: x[:2] if torch.compiler.is_compiling() else x,
        lambda x: x * torch.nan if torch.compiler.is_compiling() else x,
        lambda x: x * random.random(),
    ],
    ids=["values", "booleans", "outputs", "shapes", "nan", "random"],
)
def test_a_model_that_does_something_else_when_it_is_recorded_is_refused(body: Any) -> None:
    with pytest.raises(CaptureError, match="something else"):
        capture(Model(body).eval(), torch.randn(4, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_recorded_outputs_that_differ_by_rounding_are_accepted(dtype: torch.dtype) -> None:
    def body(x: Tensor) -> Tensor:
        return (x.double() / 3).to(dtype).log() if torch.compiler.is_compiling() else (x / 3).log()

    with torch.no_grad():
        capture(Model(body).to(dtype), torch.randn(4, 6, dtype=dtype))


def padded(nested: bool) -> nn.Module:
    """Torch's encoder, which where it skips padded tokens returns zeros for them, but not when it is compiled."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            return self.encoder(x, src_key_padding_mask=padding)

    return Padded().eval().requires_grad_(False)


def test_an_encoder_that_skips_padded_tokens_is_refused_or_right() -> None:
    padding = torch.tensor([[False] * 7, [False] * 5 + [True] * 2])
    with pytest.raises(CaptureError, match="something else"):
        capture(padded(nested=True), torch.randn(2, 7, 8), padding)
    model, x = padded(nested=False), torch.randn(2, 7, 8)
    program = capture(model, torch.randn(2, 7, 8), padding)
    torch.testing.assert_close(evaluate(program, model, Call.of(model, (x, padding), {})), model(x, padding))


def test_a_value_in_another_order_in_memory_than_its_fake_is_compared() -> None:
    # on real tensors `roll` keeps the order of its operand, on fake ones it does not
    program = capture(Model(lambda x: x.view(4, 2, 3).mT.roll(1, 1).flatten(1)).eval(), torch.randn(4, 6))
    assert torch.ops.aten.roll.default in {node.target for node in program.graph.nodes}
