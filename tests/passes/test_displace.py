"""Displaced steps against a reference that is written by hand for one small network, and what law 4 promises of all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fxpass
from fxpass.ir.exchange import Fetch, Moments
from fxpass.ir.program import exchanges_of
from fxpass.models.small import case, output_tensors
from fxpass.runtime.lockstep import LockstepExecutor
from fxpass.strategy import Strategy
from tests.runtime.plans import Block, block, parallel, steps, whole

NAMES = ("displaced", "stale_gn", "sync_gn", "separate_gn", "no_sync")


@dataclass
class Reference:
    """`Block` on n strips of rows. `old` is what each rank had at the step that serves, by place in the network."""

    model: Block
    ranks: int
    moments: str
    others: str  #: of halos, keys and values: stale or frozen
    old: dict[str, list[Tensor]] = field(default_factory=dict)

    def step(self, sample: Tensor, timestep: Tensor, exact: bool) -> Tensor:
        model = self.model
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
        old = now if exact else self.old[place]
        if exact or self.others == "stale":
            self.old[place] = now
        return lambda r: [now[k] if k == r else old[k] for k in range(self.ranks)]

    def edge(self, strips: list[Tensor], k: int, row: int) -> Tensor:
        if not 0 <= k < self.ranks:
            return torch.zeros_like(strips[0][:, :, :1])
        return strips[k][:, :, :1] if row == 0 else strips[k][:, :, -1:]

    def normed(self, strips: list[Tensor], exact: bool) -> list[Tensor]:
        norm = self.model.norm
        grouped = [h.reshape(h.shape[0], norm.num_groups, -1) for h in strips]
        now = [torch.stack([g.mean(-1), g.square().mean(-1)]) for g in grouped]  # E x and E x² (strips are even)
        old = now if exact or self.moments == "sync" else self.old["norm"]
        self.old["norm"] = now
        result = []
        for r, h in enumerate(strips):
            mine = [now[k] if k == r else old[k] for k in range(self.ranks)]
            first, second = torch.stack(mine).mean(0)
            if not exact and self.moments == "corrected":
                first, second = torch.stack(old).mean(0) + now[r] - old[r]
            if not exact and self.moments == "local":
                first, second = now[r]
            variance = second - first**2
            variance = torch.where(variance < 0, now[r][1] - now[r][0] ** 2, variance)
            scale = (variance + norm.eps).rsqrt()
            shape = (h.shape[0], norm.num_groups, 1)
            y = ((h.reshape(*shape[:2], -1) - first.view(shape)) * scale.view(shape)).view_as(h)
            result.append(y * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1))
        return result

    def attended(self, strips: list[Tensor], exact: bool) -> list[Tensor]:
        tokens = [h.flatten(2).transpose(1, 2) for h in strips]
        keys = self.of_others("keys", [self.model.key(t) for t in tokens], exact)
        values = self.of_others("values", [self.model.value(t) for t in tokens], exact)
        seen = [(torch.cat(keys(r), 1), torch.cat(values(r), 1)) for r in range(self.ranks)]
        mixed = [
            t + F.scaled_dot_product_attention(self.model.query(t), *kv) for t, kv in zip(tokens, seen, strict=True)
        ]
        return [t.transpose(1, 2).reshape(h.shape) for t, h in zip(mixed, strips, strict=True)]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_displaced_steps_equal_the_reference(name: str, ranks: int) -> None:
    model = block().double()
    strategy = Strategy.of(name)
    reference = Reference(model, ranks, strategy.moments, strategy.halo)
    module = parallel(model, LockstepExecutor(ranks), Strategy("two", *_kinds(strategy), warmup_steps=2))
    calls = [(x.double(), t.double()) for x, t in steps(6)]
    with torch.no_grad():
        for k, (sample, timestep) in enumerate(calls):
            expected = reference.step(sample, timestep, exact=k < 2)
            found = module(sample, timestep)["sample"]
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
            off = (found - whole(model, sample, timestep)).abs().max()
            assert (off < 1e-9) == (k < 2), f"step {k} is off by {off}"


def _kinds(strategy: Strategy) -> tuple[Any, ...]:
    return strategy.halo, strategy.keys_values, strategy.moments, strategy.sums


@pytest.mark.parametrize("name", ["displaced", "stale_gn", "sync_gn"])
@pytest.mark.parametrize("model_name", ["unet_sd", "flux", "sana", "cogvideox_5b"])
def test_after_an_exact_step_on_the_same_input_the_displaced_one_equals_it(model_name: str, name: str) -> None:
    chosen = case(model_name)
    model: Any = chosen.build()
    given = chosen.inputs(rows=32, seed=3, module=model)
    with fxpass.parallelize(model, 2, strategy=name, warmup_steps=1, executor="lockstep") as module, torch.no_grad():
        expected = output_tensors(model(**given))
        for _ in range(3):
            for found, wanted in zip(output_tensors(module(**given)), expected, strict=True):
                assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_every_rank_returns_the_same_though_text_is_on_all_of_them() -> None:
    """In Flux the text attends to the picture; a rank that holds it whole has its own, stale version of it."""
    chosen = case("flux")
    model: Any = chosen.build()
    with torch.no_grad(), fxpass.parallelize(model, 2, strategy="displaced", executor="lockstep", warmup_steps=1) as m:
        first = chosen.inputs(rows=32, seed=3, module=model)
        m(**first)
        (entry,) = m._engine._all()
        other = chosen.inputs(rows=32, seed=4, module=model)
        tensors = [first[p] if "text" in p else other.get(p, first.get(p)) for p in entry.plan.program.input_paths]
        step = type(entry.clock.step(tensors))(0, exact=False)
        ranks = entry.loaded.run_all(entry.weights.tensors(), tensors, step)
        for outputs in ranks[1:]:
            assert all(torch.equal(a, b) for a, b in zip(outputs, ranks[0], strict=True))


def test_only_what_law_4_allows_is_stale() -> None:
    chosen = case("unet_sd")
    model = chosen.build()
    plan = fxpass.plan(model, world_size=2, strategy="displaced", **chosen.inputs(rows=32, seed=0, module=model))
    kinds = {(e.role, e.declared.fresh) for e in plan.exchanges}
    assert kinds == {("halo", "stale"), ("keys_values", "stale"), ("moments", "corrected"), ("output", "sync")}
    received = [sum(e.declared.received(r) for e in plan.exchanges if e.role != "output") for r in range(2)]
    own = sum(_own(e.declared) for e in plan.exchanges)
    assert plan.state_bytes_per_rank == tuple(r + own for r in received)


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
