"""Higher-order functions inside a model: vmap, flex_attention, checkpoint, scripts, decorators, autocast regions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from fxpass.capture import Call, CaptureError, capture
from fxpass.capture.evaluate import evaluate
from fxpass.capture.structure import WeightTable
from fxpass.ir.strategy import Strategy
from fxpass.make_plan import make_plan
from fxpass.runtime.lockstep import LockstepExecutor

TOKENS, HEADS, WIDTH = 12, 4, 16
DOCUMENTS = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2])

Body = Any  #: a function of (module, tensor)


class Model(nn.Module):
    """A linear layer, and a function of (module, its result [2, 12, 64])."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.linear = nn.Linear(6, HEADS * WIDTH)
        self.square = nn.Linear(HEADS * WIDTH, HEADS * WIDTH)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, self.linear(x))


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)


def plain(m: Model, x: Tensor) -> Any:
    return flex_attention(heads(x), heads(x), heads(m.square(x)))


def causal(m: Model, x: Tensor) -> Any:
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, TOKENS, TOKENS, device="cpu")
    return flex_attention(heads(x), heads(x), heads(m.square(x)), block_mask=mask)


def documents(m: Model, x: Tensor) -> Any:
    mask = create_block_mask(
        lambda b, h, i, j: (DOCUMENTS[i] == DOCUMENTS[j]) | (h == 0) & (b == 1), 2, HEADS, TOKENS, TOKENS, device="cpu"
    )
    return flex_attention(heads(x), heads(x), heads(m.square(x)), block_mask=mask)


def nothing_seen(m: Model, x: Tensor) -> Any:
    mask = create_block_mask(lambda b, h, i, j: (i > 2) & (i >= j), None, None, TOKENS, TOKENS, device="cpu")
    return flex_attention(heads(x), heads(x), heads(m.square(x)), block_mask=mask)


def biased(m: Model, x: Tensor) -> Any:
    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.tanh(s * (h + 1)) - (i - j).abs() * 0.1

    return flex_attention(heads(x), heads(x), heads(m.square(x)), score_mod=score)


def grouped(m: Model, x: Tensor) -> Any:
    few = heads(x)[:, :2]
    out, lse = flex_attention(heads(x), few, few, enable_gqa=True, return_lse=True, scale=0.3)
    return out + lse[..., None]


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return F.gelu(x) * 2


@torch.autocast("cpu", torch.bfloat16)
def cast(m: Model, x: Tensor) -> Tensor:
    return m.square(x) + 1


FLEX = [plain, causal, documents, nothing_seen, biased, grouped]
OTHERS: dict[str, Any] = {
    "vmap": lambda m, x: torch.vmap(lambda row: row.softmax(-1) * row.sum())(x),
    "vmap of a layer": lambda m, x: torch.vmap(m.square, in_dims=1, out_dims=1)(x),
    "functional_call": lambda m, x: torch.func.functional_call(m.square, dict(m.square.named_parameters()), (x,)),
    "cond": lambda m, x: torch.cond(True, lambda a: a * 2, lambda a: a, (x,)),
    "checkpoint": lambda m, x: checkpoint(m.square, x, use_reentrant=False),
    "reentrant checkpoint": lambda m, x: checkpoint(m.square, x, use_reentrant=True),
    "script": lambda m, x: scripted(x),
    "autocast": cast,
    "no_grad": torch.no_grad()(lambda m, x: m.square(x)),
    "disable": torch.compiler.disable(lambda m, x: m.square(x)),
}


def made(body: Body) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model(body).eval().requires_grad_(False)


@pytest.mark.parametrize("body", [*FLEX, *OTHERS.values()], ids=[*(f.__name__ for f in FLEX), *OTHERS])
def test_the_program_equals_the_model(body: Body) -> None:
    model = made(body)
    program = capture(model, torch.randn(2, TOKENS, 6))
    x = torch.randn(2, TOKENS, 6)
    assert program.guards == ()
    torch.testing.assert_close(evaluate(program, model, Call.of(model, (x,), {})), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("body", FLEX, ids=lambda body: body.__name__)
def test_flex_attention_is_split_along_tokens(body: Body) -> None:
    model, x = made(body), torch.randn(2, TOKENS, 6)
    plan = make_plan(capture(model, torch.randn(2, TOKENS, 6)), 3, Strategy.of("sync"))
    assert not plan.fallbacks
    weights = WeightTable(model, list(plan.program.weights.values())).tensors()
    for (found,) in LockstepExecutor(3, check=True).load(plan, weights, (x,)).run_all(weights, (x,)):
        torch.testing.assert_close(found, model(x), rtol=1e-5, atol=1e-6)


def test_a_branch_on_an_activation_is_refused_with_the_line() -> None:
    body: Body = lambda m, x: torch.cond(x.sum() > 0, lambda a: a * 2, lambda a: a, (x,))  # noqa: E731
    with pytest.raises(CaptureError, match=r"test_higher_order\.py:"):
        capture(made(body), torch.randn(2, TOKENS, 6))
