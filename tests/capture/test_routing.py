"""Routing by activations is exact for all decisions of the router, or refused with the source line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxpass
from fxpass.capture import Call, capture
from fxpass.capture.evaluate import evaluate
from fxpass.capture.structure import WeightTable
from fxpass.ir.program import calls
from fxpass.ir.strategy import Strategy
from fxpass.make_plan import make_plan
from fxpass.runtime.lockstep import LockstepExecutor

EXPERTS, CHOSEN, WIDTH = 4, 2, 6

Body = Callable[["Experts", Tensor, Tensor, Tensor], Tensor]


class Experts(nn.Module):
    """Selects experts for each token by their scores; `body(module, tokens, weights, choices)` applies them."""

    def __init__(self, body: Body, experts: int, chosen: int) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 8), nn.SiLU(), nn.LayerNorm(8), nn.Linear(8, WIDTH)) for _ in range(experts)
        )
        self.body = body
        self.chosen = chosen

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        weights, choices = torch.topk(self.gate(tokens).softmax(-1), self.chosen, dim=-1)
        return self.body(self, tokens, weights, choices)


def made(body: Body, experts: int = EXPERTS, chosen: int = CHOSEN) -> Experts:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Experts(body, experts, chosen).eval().requires_grad_(False)


def looped(m: Experts, x: Tensor, w: Tensor, i: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    mask = F.one_hot(i, num_classes=len(m.experts)).permute(2, 1, 0)
    for e, expert in enumerate(m.experts):
        slot, token = torch.where(mask[e])
        out.index_add_(0, token, expert(x[None, token].reshape(-1, WIDTH)) * w[token, slot, None])
    return out


def skipped(m: Experts, x: Tensor, w: Tensor, i: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        token, slot = (i == e).nonzero(as_tuple=True)
        if token.shape[0] == 0:
            continue
        out[token] += expert(x[token]) * w[token, slot, None]
    return out


def accumulated(m: Experts, x: Tensor, w: Tensor, i: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        token, slot = torch.where(i == e)
        if token.numel():
            out.index_put_((token,), expert(x[token]) * w[token, slot, None], accumulate=True)
    return out


def counted(m: Experts, x: Tensor, w: Tensor, i: Tensor) -> Tensor:
    key, weight, out = i.view(-1), w.view(-1, 1), torch.zeros_like(x)
    order, ends = key.argsort(), key.bincount().cpu().numpy().cumsum(0)
    for e, end in enumerate(ends):
        start = 0 if e == 0 else ends[e - 1]
        if start == end:
            continue
        token = (order // m.chosen)[start:end]
        y = m.experts[e](x[token])
        y.mul_(weight[order[start:end]])
        out.scatter_reduce_(0, token.view(-1, 1).repeat(1, WIDTH), y, reduce="sum")
    return out


def put_back(m: Experts, x: Tensor, w: Tensor, i: Tensor) -> Tensor:
    counts = F.one_hot(i.view(-1), len(m.experts)).sum(0).cpu().numpy()
    order, parts, start = i.view(-1).argsort(), [], 0
    tokens = x[order // m.chosen]
    for e, count in enumerate(counts):
        if count == 0:
            continue
        parts.append(m.experts[e](tokens[start : start + count]))
        start = start + count
    joined = torch.cat(parts)
    out = torch.empty_like(joined)
    out[order] = joined
    return (out.view(*i.shape, -1) * w.unsqueeze(-1)).sum(1)


def cut_up(m: Experts, x: Tensor, w: Tensor, i: Tensor) -> Tensor:
    key = i.view(-1)
    order = key.sort(stable=True)[1]
    parts = x[order // m.chosen].split(torch.bincount(key, minlength=len(m.experts)).tolist())
    joined = torch.cat([m.experts[e](part) for e, part in enumerate(parts)])
    return (joined[order.argsort()].view(-1, m.chosen, WIDTH) * w[..., None]).sum(1)


def padded(m: Experts, x: Tensor, w: Tensor, i: Tensor) -> Tensor:
    key = i.view(-1)
    order, counts = key.argsort(), torch.bincount(key, minlength=len(m.experts)).tolist()
    tokens, real = x[order // m.chosen], sum(counts)
    parts = torch.split(tokens[:real], split_size_or_sections=counts, dim=0)
    joined = torch.cat([expert(part) for expert, part in zip(m.experts, parts, strict=True)])
    joined = torch.vstack((joined, joined.new_zeros((tokens.shape[0] - real, WIDTH))))
    return torch.zeros_like(x).index_add(0, order // m.chosen, joined * w.view(-1)[order].unsqueeze(-1))


def masked(m: Experts, x: Tensor, w: Tensor, i: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        chosen = i == e
        if chosen.any():
            rows = chosen.any(-1)
            out[rows] += expert(x[rows]) * (w * chosen).sum(-1, keepdim=True)[rows]
    return out


def repeated(m: Experts, x: Tensor, w: Tensor, i: Tensor) -> Tensor:
    key, tokens = i.view(-1), x.repeat_interleave(m.chosen, dim=0)
    out = torch.empty_like(tokens)
    for e, expert in enumerate(m.experts):
        out[key == e] = expert(tokens[key == e])
    return (out.view(*w.shape, -1) * w.unsqueeze(-1)).sum(1)


def one_each(m: Experts, x: Tensor, w: Tensor, i: Tensor) -> Tensor:
    choice, out = m.gate(x).topk(1)[1].squeeze(-1), torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        out[choice == e] = expert(x[choice == e])
    return out


def dispatched(m: Experts, x: Tensor, w: Tensor, i: Tensor) -> Tensor:
    given = torch.einsum("tke,tk->te", F.one_hot(i, len(m.experts)).to(w), w)
    return torch.einsum("etd,te->td", torch.stack([expert(x) for expert in m.experts]), given)


def balanced(m: Experts, x: Tensor, w: Tensor, i: Tensor) -> Tensor:
    """Uses the numbers of tokens as a tensor."""
    return x * (1 + i.view(-1).bincount(minlength=len(m.experts))[i[:, :1]] / 10)


def bounded(m: Experts, x: Tensor, w: Tensor, i: Tensor) -> Tensor:
    """Slices by bounds that stay tensors."""
    key, out, start = i.view(-1), torch.zeros_like(x), 0
    order, ends = key.argsort(), key.bincount(minlength=len(m.experts)).cumsum(0)
    for e, expert in enumerate(m.experts):
        end = ends[e]
        if start != end:
            rows = order[start:end]
            out.index_add_(0, rows // m.chosen, expert(x[rows // m.chosen]) * w.view(-1, 1)[rows])
        start = end
    return out


def offset(m: Experts, x: Tensor, w: Tensor, i: Tensor) -> Tensor:
    """Slices by bounds that stay tensors, are computed from each other, and are read from views."""
    key, out = i.view(-1), torch.zeros_like(x)
    order, counts = key.argsort(), key.bincount(minlength=len(m.experts))
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])[:-1]
    for e, (start, count) in enumerate(zip(starts, counts.unbind(), strict=True)):
        if count > 0:
            rows = order[start : start + count]
            out.index_add_(0, rows // m.chosen, m.experts[e](x[rows // m.chosen]) * w.view(-1, 1)[rows])
    return out


def paired(m: Experts, x: Tensor, w: Tensor, i: Tensor) -> Tensor:
    """Slices by bounds that stay tensors, of which the first is padding."""
    key, out = i.view(-1), torch.zeros_like(x)
    order, ends = key.argsort(), F.pad(key.bincount(minlength=len(m.experts)).cumsum(0), (1, 0))
    for e, expert in enumerate(m.experts):
        if (ends[e + 1] - ends[e]).item() == 0:
            continue
        rows = order[ends[e] : ends[e + 1]]
        out.index_add_(0, rows // m.chosen, expert(x[rows // m.chosen]) * w.view(-1, 1)[rows])
    return out


def halved(m: Experts, x: Tensor, w: Tensor, i: Tensor) -> Tensor:
    """One expert serves several members of the key."""
    key, out, half = i.view(-1), torch.zeros_like(x), max(1, len(m.experts) // 2)
    order, ends = key.argsort(), [0, *key.bincount(minlength=len(m.experts)).cumsum(0).tolist()]
    for start, end in ((0, half), (half, len(m.experts))):
        rows = order[ends[start] : ends[end]]
        y = m.experts[start % len(m.experts)](x[rows // m.chosen])
        out.index_add_(0, rows // m.chosen, y * w.view(-1, 1)[rows])
    return out


def sized(m: Experts, x: Tensor, w: Tensor, i: Tensor) -> Tensor:
    """Sizes with a number of rows, first or later, are given one by one, and as a tuple."""
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        token, slot = torch.where(i == e)
        weight = w[token, slot].view(1, token.shape[0]).unsqueeze(-1)
        y = expert(x[token].view(token.shape[0], WIDTH)).view((token.shape[0], WIDTH))
        out.index_add_(0, token, (y.reshape((1, token.shape[0], WIDTH)) * weight).squeeze(0))
    return out


STYLES = [
    looped,
    skipped,
    accumulated,
    counted,
    put_back,
    cut_up,
    padded,
    masked,
    repeated,
    one_each,
    dispatched,
    bounded,
    offset,
    paired,
    halved,
    sized,
]


def inputs() -> list[Tensor]:
    """Random tokens, and equal tokens, so that most experts get none."""
    generator = torch.Generator().manual_seed(1)
    mixed = [torch.randn(2, 6, WIDTH, generator=generator) for _ in range(6)]
    return mixed + [torch.randn(1, 1, WIDTH, generator=generator).expand(2, 6, WIDTH).contiguous() for _ in range(6)]


@pytest.mark.parametrize("body", [*STYLES, balanced], ids=lambda body: body.__name__)
def test_routing_is_exact_for_all_decisions_of_the_router(body: Body) -> None:
    model = made(body)
    program = capture(model, torch.randn(2, 6, WIDTH))
    assert program.guards == ()
    for x in inputs():
        torch.testing.assert_close(evaluate(program, model, Call.of(model, (x,), {})), model(x), rtol=1e-5, atol=1e-6)
    for node in calls(program.graph):
        assert "fxpass_rows" not in str(node.target)


@pytest.mark.parametrize(("experts", "chosen"), [(1, 1), (2, 1), (2, 2), (3, 2), (3, 3)])
@pytest.mark.parametrize("body", STYLES, ids=lambda body: body.__name__)
def test_any_number_of_experts_may_be_active(body: Body, experts: int, chosen: int) -> None:
    model = made(body, experts, chosen)
    program = capture(model, torch.randn(2, 6, WIDTH))
    for x in inputs()[::4]:
        torch.testing.assert_close(evaluate(program, model, Call.of(model, (x,), {})), model(x), rtol=1e-5, atol=1e-6)


def test_two_layers_of_two_experts_are_exact() -> None:
    """The answers in the first layer do not change the number of questions in the second."""
    model = nn.Sequential(made(counted, 2, 2), made(bounded, 2, 1), made(put_back, 2, 2)).eval()
    program = capture(model, torch.randn(2, 6, WIDTH))
    for x in inputs()[::4]:
        torch.testing.assert_close(evaluate(program, model, Call.of(model, (x,), {})), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("body", STYLES, ids=lambda body: body.__name__)
def test_each_rank_routes_its_own_tokens(body: Body) -> None:
    model = made(body)
    plan = make_plan(capture(model, torch.randn(2, 6, WIDTH)), 3, Strategy.of("sync"))
    assert not plan.fallbacks
    assert set(plan.bytes_by_role) <= {"output"}
    weights = WeightTable(model, list(plan.program.weights.values())).tensors()
    loaded = LockstepExecutor(3, check=True).load(plan, weights, (torch.randn(2, 6, WIDTH),))
    for x in inputs():
        for (found,) in loaded.run_all(weights, (x,)):
            torch.testing.assert_close(found, model(x), rtol=1e-5, atol=1e-6)


_turn = torch.view_as_complex(torch.linspace(0, 1, 2 * WIDTH).view(WIDTH, 2)).conj()


@pytest.mark.parametrize("turn", [_turn, _turn.imag], ids=["conjugated", "negated"])
def test_constants_that_torch_conjugates_or_negates_lazily_are_compared(turn: Tensor) -> None:
    def body(m: Experts, x: Tensor, w: Tensor, i: Tensor) -> Tensor:
        return skipped(m, torch.view_as_real(x * turn.resolve_conj() + 0j).sum(-1), w, i)

    model = made(body)
    program = capture(model, torch.randn(2, 6, WIDTH))
    x = inputs()[0]
    torch.testing.assert_close(evaluate(program, model, Call.of(model, (x,), {})), model(x), rtol=1e-5, atol=1e-6)


def test_results_of_an_expert_for_unselected_tokens_are_discarded() -> None:
    """Also infinite ones."""

    def body(m: Experts, x: Tensor, w: Tensor, i: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(EXPERTS):
            token, slot = torch.where(i == e)
            own = (i[token] == e).any(-1, keepdim=True)
            out.index_add_(0, token, x[token] * w[token, slot, None] / own)
        return out

    model = made(body)
    program = capture(model, torch.randn(2, 6, WIDTH))
    x = inputs()[0]
    assert model(x).isfinite().all()
    torch.testing.assert_close(evaluate(program, model, Call.of(model, (x,), {})), model(x))


def test_numbers_of_rows_that_differ_by_a_known_number_are_compared() -> None:
    def body(m: Experts, x: Tensor, w: Tensor, i: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(EXPERTS):
            token, slot = torch.where(i == e)
            n = token.shape[0]
            true = [n < n + 1, n + 1 > n, n == n + 0, n != n + 1, n <= n, n >= n - 1]
            false = [n < n, n > n, n > n + 1, n == n + 1, n + 1 < n]
            out.index_add_(0, token, x[token] * w[token, slot, None] * (sum(true) + 100 * sum(false)))
        return out

    model = made(body)
    program = capture(model, torch.randn(2, 6, WIDTH))
    for x in inputs():
        found = evaluate(program, model, Call.of(model, (x,), {}))
        torch.testing.assert_close(found, model(x), rtol=1e-5, atol=1e-5)


class Counting(nn.Module):
    """Returns how often each whole number occurs, with no bound that the model names."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, x[:, 0].abs().long().bincount()


def test_an_output_may_have_as_many_elements_as_values_ask_for() -> None:
    model = Counting().eval()
    split = fxpass.parallelize(model, 2, executor="lockstep")
    for scale in (3, 9, 20):
        x = torch.randn(8, 3) * scale
        for found, expected in zip(split(x), model(x), strict=True):
            assert torch.equal(found, expected)
