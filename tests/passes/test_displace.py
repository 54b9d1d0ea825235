"""Displaced steps against a reference that is written by hand for one small network, and what law 4 promises of all."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fxpass
from fxpass.capture.structure import WeightTable
from fxpass.ir.comm import kept_bytes
from fxpass.ir.fetch import Fetch
from fxpass.ir.merge import Moments
from fxpass.ir.program import exchanges_of
from fxpass.ir.step import Step
from fxpass.ir.strategy import Strategy
from fxpass.models.small import case, output_tensors
from fxpass.runtime.lockstep import LockstepExecutor
from tests.runtime.plans import Block, block, parallel, steps, whole

NAMES = ("displaced", "compressed", "corrected_async_gn", "stale_gn", "sync_gn", "separate_gn", "no_sync", "pcpp")


@dataclass
class Reference:
    """`Block` on n strips of rows. `old` is what each rank had at the step that serves, `older` before, by place;
    `known` what the others have made of it, `guessed` of the step before."""

    model: Block
    ranks: int
    strategy: Strategy
    old: dict[str, list[Tensor]] = field(default_factory=dict)
    older: dict[str, list[Tensor]] = field(default_factory=dict)
    known: dict[str, list[Tensor]] = field(default_factory=dict)
    guessed: dict[str, list[Tensor]] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)

    def step(self, sample: Tensor, timestep: Tensor, exact: bool) -> Tensor:
        model = self.model
        self.times = [*self.times, timestep.item()][-3:]
        # every rank is given the whole sample
        first = model.conv_in(sample) + timestep.view(-1, 1, 1, 1)
        strips = list(first.chunk(self.ranks, 2))
        strips = [F.silu(h) for h in self.normed(strips, exact)]
        above = self.of_others("down", strips, exact)
        rows = [torch.cat([self.edge(above(r), r - 1, -1), h], 2) for r, h in enumerate(strips)]
        strips = [F.conv2d(F.pad(h, (1, 1, 0, 0)), model.down.weight, model.down.bias, 2) for h in rows]
        strips = self.attended(strips, exact)
        strips = [F.interpolate(h, scale_factor=2.0) for h in strips]
        seen = self.of_others("conv_out", strips, exact)
        rows = [
            torch.cat([self.edge(seen(r), r - 1, -1), h, self.edge(seen(r), r + 1, 0)], 2) for r, h in enumerate(strips)
        ]
        out = [F.conv2d(F.pad(h, (1, 1, 0, 0)), model.conv_out.weight, model.conv_out.bias) for h in rows]
        return torch.cat(out, 2)

    def of_others(self, place: str, now: list[Tensor], exact: bool) -> Any:
        """For rank r: the values of all ranks as r has them: the own now, the others' of the step that serves."""
        assert self.strategy.halo == self.strategy.keys_values
        old = now if exact else self.old[place]
        then = self.older.get(place, old)
        known = now if exact else self.known[place]
        before = self.guessed.get(place, known)
        if exact or self.strategy.halo == "stale":
            self.old[place], self.older[place] = now, self.old.get(place, now)
            told = now if exact or not self.strategy.bits else list(map(self.told, known, now))
            self.known[place], self.guessed[place] = told, self.known.get(place, now)
        if exact or now[0].ndim < 4 or not self.strategy.forecast or len(self.times) < 3:
            return lambda r: [now[k] if k == r else known[k] for k in range(self.ranks)]
        on = [self.trend(now[r], old[r], then[r]) for r in range(self.ranks)]
        return lambda r: [now[k] if k == r else known[k] + on[r] * (known[k] - before[k]) for k in range(self.ranks)]

    def told(self, known: Tensor, now: Tensor) -> Tensor:
        """What the others know after they were told of the change in two bits: one of four levels per number."""
        assert self.strategy.bits == 2
        change = (now - known).float()
        assert change.shape[-1] <= 64  # one group
        step = (0.8 / 1.5 * change.abs().amax(-1, keepdim=True)).bfloat16().float()
        levels = step.unsqueeze(-1) * torch.tensor([-1.5, -0.5, 0.5, 1.5])
        nearest = (change.unsqueeze(-1) - levels).abs().argmin(-1, keepdim=True)
        return known + levels.expand(*change.shape, 4).gather(-1, nearest).squeeze(-1).to(known.dtype)

    def trend(self, now: Tensor, old: Tensor, older: Tensor) -> Tensor:
        """How much of the last change of a rank's own border rows went on, per sample."""
        if now.shape[2] > 2:
            now, old, older = (torch.stack([h[:, :, 0], h[:, :, -1]]).transpose(0, 1) for h in (now, old, older))
        last = (old - older).flatten(1)
        went_on = ((now - old).flatten(1) * last).sum(1) / last.square().sum(1)
        return went_on.clamp(0, 1).view(-1, 1, 1, 1)

    @property
    def going_on(self) -> float:
        """How much of the last change of moments is expected at this step."""
        if len(self.times) < 3:
            return 0.0
        t2, t1, t0 = self.times
        return 0.5 * (t1 - t0) / (t2 - t1)

    def edge(self, strips: list[Tensor], k: int, row: int) -> Tensor:
        if not 0 <= k < self.ranks:
            return torch.zeros_like(strips[0][:, :, :1])
        return strips[k][:, :, :1] if row == 0 else strips[k][:, :, -1:]

    def normed(self, strips: list[Tensor], exact: bool) -> list[Tensor]:
        norm = self.model.norm
        grouped = [h.reshape(h.shape[0], norm.num_groups, -1) for h in strips]
        now = [torch.stack([g.mean(-1), g.square().mean(-1)]) for g in grouped]  # E x and E x² (strips are even)
        kind = self.strategy.moments
        old = now if exact or kind == "sync" else self.old["norm"]
        older = self.older.get("norm", old)
        self.old["norm"], self.older["norm"] = now, self.old.get("norm", now)
        result = []
        for r, h in enumerate(strips):
            mine = [now[k] if k == r else old[k] for k in range(self.ranks)]
            if not exact and kind == "predicted":
                mine = [
                    now[k] if k == r else self.predicted(now[r], old[r], old[k], older[k]) for k in range(self.ranks)
                ]
            first, second = torch.stack(mine).mean(0)
            if not exact and kind == "corrected":
                first, second = torch.stack(old).mean(0) + now[r] - old[r]
            if not exact and kind == "local":
                first, second = now[r]
            variance = second - first**2
            variance = torch.where(variance < 0, now[r][1] - now[r][0] ** 2, variance)
            scale = (variance + norm.eps).rsqrt()
            shape = (h.shape[0], norm.num_groups, 1)
            y = ((h.reshape(*shape[:2], -1) - first.view(shape)) * scale.view(shape)).view_as(h)
            result.append(y * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1))
        return result

    def predicted(self, own_now: Tensor, own_old: Tensor, old: Tensor, older: Tensor) -> Tensor:
        """Another's E x and E x², moved by shares of the own change and of its own last one."""
        share, means = 0.5, [m[0] for m in (own_now, own_old, old, older)]
        a, b, c, d = (m[1] - m[0] ** 2 for m in (own_now, own_old, old, older))  # variances
        mean = means[2] + share * (means[0] - means[1]) + self.going_on * (means[2] - means[3])
        variance = c * (a / b).clamp(0.5, 2) ** share * (c / d).clamp(0.5, 2) ** self.going_on
        return torch.stack([mean, variance + mean**2])

    def attended(self, strips: list[Tensor], exact: bool) -> list[Tensor]:
        tokens = [h.flatten(2).transpose(1, 2) for h in strips]
        keys = self.of_others("keys", [self.model.key(t) for t in tokens], exact)
        values = self.of_others("values", [self.model.value(t) for t in tokens], exact)
        seen = [(self.window(keys(r), r, exact), self.window(values(r), r, exact)) for r in range(self.ranks)]
        mixed = [
            t + F.scaled_dot_product_attention(self.model.query(t), *kv) for t, kv in zip(tokens, seen, strict=True)
        ]
        return [t.transpose(1, 2).reshape(h.shape) for t, h in zip(mixed, strips, strict=True)]

    def window(self, tokens: list[Tensor], rank: int, exact: bool) -> Tensor:
        """Of the tokens of all ranks those that `rank` sees: its own, and the nearest share of each neighbour's."""
        if exact or not self.strategy.windows:
            return torch.cat(tokens, 1)
        (share,) = self.strategy.windows
        count = math.ceil(share * tokens[rank].shape[1])  # strips are even
        above = [t[:, -count:] for t in tokens[:rank][-1:]]
        below = [t[:, :count] for t in tokens[rank + 1 :][:1]]
        return torch.cat([*above, tokens[rank], *below], 1)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_displaced_steps_equal_the_reference(name: str, ranks: int) -> None:
    model = block().double()
    strategy = Strategy.of(name)
    reference = Reference(model, ranks, strategy)
    module = parallel(model, LockstepExecutor(ranks), replace(strategy, warmup_steps=2))
    calls = [(x.double(), t.double()) for x, t in steps(6)]
    with torch.no_grad():
        for k, (sample, timestep) in enumerate(calls):
            expected = reference.step(sample, timestep, exact=k < 2)
            found = module(sample, timestep)["sample"]
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
            off = (found - whole(model, sample, timestep)).abs().max()
            assert (off < 1e-9) == (k < 2), f"step {k} is off by {off}"


QUICK = ("displaced", "compressed")


@pytest.mark.parametrize(
    ("model_name", "name"),
    [
        pytest.param(model, name, marks=[] if model == "unet_sd" or name in QUICK else pytest.mark.slow)
        for model in ("unet_sd", "flux", "sana", "cogvideox_5b")
        for name in ("displaced", "compressed", "corrected_async_gn", "stale_gn", "sync_gn")
    ],
)
def test_after_an_exact_step_on_the_same_input_the_displaced_one_equals_it(model_name: str, name: str) -> None:
    chosen = case(model_name)
    model: Any = chosen.build()
    given = chosen.inputs(rows=32, seed=3, module=model)
    with fxpass.parallelize(model, 2, strategy=name, warmup_steps=1, executor="lockstep") as module, torch.no_grad():
        expected = output_tensors(model(**given))
        for _ in range(2):
            for found, wanted in zip(output_tensors(module(**given)), expected, strict=True):
                assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_every_rank_returns_the_same_though_text_is_on_all_of_them() -> None:
    """In Flux the text attends to the picture; a rank that holds it whole has its own, stale version of it."""
    chosen = case("flux")
    model: Any = chosen.build()
    with torch.no_grad(), fxpass.parallelize(model, 2, strategy="displaced", executor="lockstep", warmup_steps=1) as m:
        first = chosen.inputs(rows=32, seed=3, module=model)
        m(**first)
        (entry,) = m._engine.programs.all()
        other = chosen.inputs(rows=32, seed=4, module=model)
        tensors = [first[p] if "text" in p else other.get(p, first.get(p)) for p in entry.plan.program.input_paths]
        step = Step(0, exact=False)
        ranks = entry.loaded.run_all(entry.weights.tensors(), tensors, step)
        for outputs in ranks[1:]:
            assert all(torch.equal(a, b) for a, b in zip(outputs, ranks[0], strict=True))


class Pooled(torch.nn.Module):
    """Every rank holds the mean of all rows, of which each has its own, stale idea; and an integer made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 8, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.conv(sample) + timestep.view(-1, 1, 1, 1)
        mean = h.mean((2, 3))
        return h * mean.view(*mean.shape, 1, 1), mean, mean.argmax(1)


@pytest.mark.parametrize("ranks", [2, 4])
@torch.no_grad()
def test_stale_sums_are_the_own_part_and_the_others_of_the_last_step(ranks: int) -> None:
    torch.manual_seed(0)
    model = Pooled().eval().double()
    calls = [(torch.randn(6, 4, 16, 8).double(), torch.tensor([0.9 - 0.1 * k]).double()) for k in range(4)]
    program = fxpass.capture(model, *calls[0])
    plan = fxpass.plan(program, world_size=ranks, strategy="stale_gn")
    weights = WeightTable(model, list(program.weights.values())).tensors()
    loaded = LockstepExecutor(ranks).load(plan, weights, calls[0])
    old: list[Tensor] = []
    for k, (sample, timestep) in enumerate(calls):
        strips = (model.conv(sample) + timestep).chunk(ranks, 2)  # of rows
        now = [h.sum((2, 3)) for h in strips]
        old = old or now
        seen = [torch.stack([now[i] if i == r else old[i] for i in range(ranks)]) for r in range(ranks)]
        means = [each.sum(0) / (16 * 8) for each in seen]
        scaled = torch.cat([h * mean.view(6, 8, 1, 1) for h, mean in zip(strips, means, strict=True)], 2)
        first, *others = loaded.run_all(weights, calls[k], Step(exact=k == 0))
        for found, expected in zip(first, (scaled, means[0], means[0].argmax(1)), strict=True):  # the first rank's
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        assert all(torch.equal(a, b) for outputs in others for a, b in zip(outputs, first, strict=True))
        assert torch.allclose(means[0], model(sample, timestep)[1], atol=1e-3) == (k == 0)  # it is stale
        old = now


def test_only_exchanges_that_law_4_allows_are_stale() -> None:
    chosen = case("unet_sd")
    model = chosen.build()
    given = chosen.inputs(rows=32, seed=0, module=model)
    plan = fxpass.plan(model, world_size=2, strategy="corrected_async_gn", **given)
    kinds = {(e.role, e.declared.fresh) for e in plan.exchanges}
    assert kinds == {("halo", "stale"), ("keys_values", "stale"), ("moments", "corrected"), ("output", "sync")}
    received = [sum(e.declared.received(r) for e in plan.exchanges if e.role != "output") for r in range(2)]
    own = sum(_own(e.declared) for e in plan.exchanges)
    assert plan.state_bytes_per_rank == tuple(r + own for r in received)  # the last messages, and its own moments
    ours = fxpass.plan(model, world_size=2, strategy="displaced", **given)
    more = [sum(_for_forecasts(e.declared, r) for e in ours.exchanges if e.declared.forecast) for r in range(2)]
    assert ours.state_bytes_per_rank == tuple(r + m + own for r, m in zip(received, more, strict=True))
    assert {e.role for e in ours.exchanges if e.declared.forecast} == {"halo", "moments"}


def _for_forecasts(exchange: Any, rank: int) -> int:
    """The message before the last one, and of a halo the own border rows of two steps."""
    if isinstance(exchange, Moments):
        return 2 * exchange.received(rank)  # with a place for the own part
    row = math.prod(exchange.shape) // exchange.shape[exchange.dim] * exchange.dtype.itemsize
    own, most = len(exchange.have[rank]), max(len(exchange.table[r][1 - r]) for r in range(2))
    return exchange.received(rank) + 2 * row * min(own, 2 * most)


def _own(exchange: Any) -> int:
    return exchange.numel(0, 1) * exchange.dtype.itemsize if isinstance(exchange, Moments) else 0


def test_a_stale_exchange_is_still_one_message_per_pair() -> None:
    chosen = case("unet_sd")
    model = chosen.build()
    given = chosen.inputs(rows=32, seed=0, module=model)
    exact, stale = (fxpass.plan(model, world_size=3, strategy=s, **given) for s in ("sync", "displaced"))
    assert [len(e) for _, e in exchanges_of(exact.graph)] == [len(e) for _, e in exchanges_of(stale.graph)]
    assert not any(isinstance(e.declared, Fetch) and e.declared.owners for e in exact.exchanges)


class Counting(torch.nn.Module):
    """Two sums that travel together, one of them of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.conv(x) + timestep
        return h, (h > 0).sum((2, 3)), h.sum((2, 3))


def test_an_integer_that_travels_with_a_number_keeps_it_exact() -> None:
    plan = fxpass.plan(Counting(), torch.randn(1, 3, 16, 8), torch.ones(1), world_size=2, strategy="displaced")
    sums = [e.declared for e in plan.exchanges if e.role == "sum"]
    assert {e.fresh for e in sums if not e.dtype.is_floating_point} == {"sync"}
    assert {e.dtype for e in sums} == {torch.float32, torch.int64}


class Texted(torch.nn.Module):
    """Cross-attention to a long text that is worth splitting, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 4, 3, padding=1)
        self.text = torch.nn.Sequential(torch.nn.Linear(16, 512), torch.nn.SiLU(), torch.nn.Linear(512, 64))
        self.out = torch.nn.Linear(64, 4)

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        h = self.conv(sample) + timestep.view(-1, 1, 1, 1)
        keys = self.text(text)
        q = F.pad(h.flatten(2).transpose(1, 2), (0, 60))
        mixed = self.out(F.scaled_dot_product_attention(q, keys, keys)).transpose(1, 2).unflatten(2, h.shape[2:])
        return self.conv(h + mixed)


def test_values_that_depend_on_the_prompt_alone_travel_at_exact_steps_only() -> None:
    torch.manual_seed(0)
    model = Texted().eval()
    sample, time, text = torch.randn(2, 4, 16, 8), torch.tensor([0.9]), torch.randn(2, 256, 16)
    plan = fxpass.plan(model, sample, time, text, world_size=2, strategy="stale_gn")
    assert {(e.role, e.declared.fresh) for e in plan.exchanges} == {("keys_values", "frozen")}
    assert plan.bytes_received(0)["keys_values"] > 0
    assert not plan.bytes_received(0, exact=False)
    module = fxpass.parallelize(model, 2, strategy="stale_gn", warmup_steps=1, executor="lockstep")
    with torch.no_grad():
        for prompt in (text, text + 1, text[:, :192]):  # another prompt is another context
            torch.testing.assert_close(module(sample, time, prompt), model(sample, time, prompt))
            torch.testing.assert_close(module(sample, time, prompt), model(sample, time, prompt))


class Prompted(torch.nn.Module):
    """A block with all kinds of stale exchanges, whose sample a prompt of any length changes."""

    def __init__(self) -> None:
        super().__init__()
        self.block = block()
        self.text = torch.nn.Linear(16, 4)

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        shift = self.text(text).mean(1).view(-1, 4, 1, 1)
        return self.block(sample + shift, timestep)["sample"]


@pytest.mark.parametrize("name", ["displaced", "stale_gn", "pcpp"])
@torch.no_grad()
def test_a_prompt_of_another_length_begins_exactly(name: str) -> None:
    torch.manual_seed(0)
    model, text = Prompted().eval(), torch.randn(2, 256, 16)
    strategy = replace(Strategy.of(name), warmup_steps=1)
    used, new = (parallel(model, LockstepExecutor(2), strategy) for _ in range(2))
    for k, call in enumerate(steps(6)):
        given = *call, text[:, : 256 if k < 3 else 192]
        found, expected = used(*given), model(*given)
        off = (found - expected).abs().max()
        assert (off < 1e-5) == (k in (0, 3)), f"step {k} is off by {off}"
        if k >= 3:  # as if there had been no other prompt before
            assert torch.equal(found, new(*given))


@pytest.mark.parametrize("name", ["displaced", "compressed", "corrected_async_gn", "stale_gn", "no_sync", "pcpp"])
def test_state_between_steps_has_the_bytes_of_the_plan_and_does_not_grow(name: str) -> None:
    model = block()
    module = parallel(model, LockstepExecutor(2), replace(Strategy.of(name), warmup_steps=2))
    for generation in range(200 if name == "displaced" else 3):
        for call in steps(4, seed=generation % 3):
            module(*call)
        (entry,) = module._engine.programs.all()
        if generation == 1:
            first = _kept(entry.loaded)
    assert _kept(entry.loaded) == first
    plan = entry.plan
    assert first == [sum(kept_bytes(some, rank) for _, some in exchanges_of(plan.graph)) for rank in range(2)]


def _kept(loaded: Any) -> list[int]:
    """Bytes that each rank holds from step to step: its state, and the messages that its channels hold."""
    sizes = []
    for runner in loaded.ranks:
        channels = [channel for context in runner._contexts.values() for channel in context.channels]
        messages = [x for channel in channels for payloads in channel.inbox.values() for x in payloads]
        sizes.append(sum(x.nbytes for x in (*runner.kept(), *messages) if x is not None))
    return sizes
