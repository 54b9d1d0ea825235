"""Windows of keys and values: which tokens they hold, what travels, and that exact steps do without them."""

from __future__ import annotations

from math import ceil
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

import fxpass
from fxpass.ir.fetch import Fetch
from fxpass.ir.layout import Rows, even, full
from fxpass.ir.strategy import Strategy
from fxpass.models.small import case, output_tensors
from fxpass.passes.narrow import _nearest, windows_of
from fxpass.runtime.lockstep import LockstepExecutor
from tests.properties import given
from tests.runtime.plans import block, parallel, steps, whole


def positions(rows: Rows) -> list[int]:
    return rows.array.tolist()


def test_a_window_is_the_own_tokens_and_the_nearest_of_the_neighbours() -> None:
    windows = windows_of(even(40, 4), 0.3)
    assert positions(windows[0]) == list(range(13))
    assert positions(windows[1]) == list(range(7, 23))
    assert positions(windows[3]) == list(range(27, 40))


def test_each_frame_of_a_video_has_a_window() -> None:
    frames = [Rows.of([f * 12 + r * 4 + i for f in range(3) for i in range(4)]) for r in range(3)]
    middle = windows_of(tuple(frames), 0.5)[1]
    assert positions(middle) == [f * 12 + i for f in range(3) for i in range(2, 10)]


@pytest.mark.parametrize("split", [True, False])
def test_text_beside_the_picture_is_seen_by_all(split: bool) -> None:
    text = even(5, 3) if split else full(5, 3)
    have = tuple(t | p.shift(5) for t, p in zip(text, even(30, 3), strict=True))
    for rank, window in enumerate(windows_of(have, 0.2)):
        assert set(range(5)) <= set(positions(window))
        picture = [p - 5 for p in positions(window) if p >= 5]
        assert picture == list(range(max(0, rank * 10 - 2), min(30, rank * 10 + 12)))


@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.floats(0.01, 1), st.integers(1, 4))
def test_windows_of_uneven_strips(sizes: list[int], share: float, frames: int) -> None:
    total = sum(sizes)
    starts = [sum(sizes[:r]) for r in range(len(sizes))]
    have = tuple(
        Rows.of([f * total + s + i for f in range(frames) for i in range(n)])
        for s, n in zip(starts, sizes, strict=True)
    )
    for rank, window in enumerate(windows_of(have, share)):
        seen = set(positions(window))
        assert set(positions(have[rank])) <= seen
        for other, rows in enumerate(have):
            here = len(seen & set(positions(rows)))
            near = frames * ceil(share * sizes[other])
            assert here == (len(rows) if other == rank else near if abs(other - rank) == 1 else 0)


@pytest.mark.parametrize(("ranks", "share"), [(2, 0.3), (4, 0.3), (4, 1.0)])
def test_displaced_attention_equals_one_written_by_hand(ranks: int, share: float) -> None:
    torch.manual_seed(0)
    network = Tokens().double().eval()
    strategy = Strategy("window", keys_values="stale", window=share, warmup_steps=1)
    module = parallel(network, LockstepExecutor(ranks), strategy)
    x = torch.randn(2, 48, 8, dtype=torch.float64)
    old: list[Tensor] = []
    for step in range(4):
        x = x + 0.1 * torch.randn_like(x)
        time = torch.tensor([1.0 - step / 10], dtype=torch.float64)
        with torch.no_grad():
            found = module(x, time)
            now = (x + time).chunk(ranks, 1)
            if step:
                expected = torch.cat([by_hand(network, list(now), old, r, share) for r in range(ranks)], 1)
            else:
                expected = network(x, time)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        old = list(now)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        h = x + timestep
        q, k, v = (layer(h).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return h + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def by_hand(model: Tokens, now: list[Tensor], old: list[Tensor], rank: int, share: float) -> Tensor:
    """Rank `rank`'s tokens after attention to its own and the nearest old ones of its neighbours."""
    near = [now[rank]]
    if rank:
        above = old[rank - 1]
        near.insert(0, above[:, above.shape[1] - ceil(share * above.shape[1]) :])
    if rank + 1 < len(now):
        below = old[rank + 1]
        near.append(below[:, : ceil(share * below.shape[1])])
    seen = torch.cat(near, 1)
    q, k, v = (
        layer(x).unflatten(-1, (2, 4)).transpose(1, 2)
        for layer, x in ((model.q, now[rank]), (model.k, seen), (model.v, seen))
    )
    return now[rank] + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_causal_attention_sees_what_is_in_its_window_and_past() -> None:
    class Causal(Tokens):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            h = x + timestep
            q, k, v = (layer(h).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            return h + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    torch.manual_seed(0)
    network = Causal().eval()
    module = parallel(network, LockstepExecutor(2), Strategy("w", keys_values="stale", window=0.25, warmup_steps=1))
    x, time = torch.randn(1, 16, 8), torch.tensor([1.0])
    with torch.no_grad():
        torch.testing.assert_close(module(x, time), network(x, time))
        found, wanted = module(x, time - 0.1), network(x, time - 0.1)
        h = x + time - 0.1
        torch.testing.assert_close(found[:, :8], wanted[:, :8])  # sees no token of the other rank
        q, k, v = (f(h).unflatten(-1, (2, 4)).transpose(1, 2) for f in (network.q, network.k, network.v))
        k[:, :, 6:8], v[:, :, 6:8] = (
            f(x + time).unflatten(-1, (2, 4)).transpose(1, 2)[:, :, 6:8] for f in (network.k, network.v)
        )
        mask = torch.ones(16, 16, dtype=torch.bool).tril()[8:, 6:]
        by_window = F.scaled_dot_product_attention(q[:, :, 8:], k[:, :, 6:], v[:, :, 6:], attn_mask=mask)
        torch.testing.assert_close(found[:, 8:], h[:, 8:] + by_window.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("name", ["unet_sd", "flux", "cogvideox_5b"])
def test_models_run_with_windows_and_only_those_travel(name: str) -> None:
    chosen = case(name)
    model: Any = chosen.build()
    given = chosen.inputs(rows=32, seed=3, module=model)
    plan = fxpass.plan(model, world_size=4, strategy="pcpp", **given)
    full = fxpass.plan(model, world_size=4, strategy="displaced", **given)
    windowed = [e.declared for e in plan.exchanges if isinstance(e.declared, Fetch) and e.declared.window]
    assert windowed
    assert {e.role for e in windowed} == {"keys_values"}
    received = [sum(p.bytes_received(r, exact=False).values()) for p in (plan, full) for r in range(4)]
    assert max(received[:4]) < max(received[4:])
    assert plan.bytes_received_per_rank == full.bytes_received_per_rank
    assert max(plan.state_bytes_per_rank) < max(full.state_bytes_per_rank)
    with fxpass.parallelize(model, 4, strategy="pcpp", warmup_steps=1, executor="lockstep") as module, torch.no_grad():
        for step in range(2):
            call = given | {"timestep": (given["timestep"] * (1 - 0.1 * step)).to(given["timestep"].dtype)}
            for found, wanted in zip(output_tensors(module(**call)), output_tensors(model(**call)), strict=True):
                off = (found - wanted).abs().max() / wanted.abs().max()
                assert (off <= 1e-5) if step == 0 else (1e-3 < off < 1)


def test_the_window_may_change_with_depth() -> None:
    chosen = case("flux")
    model: Any = chosen.build()
    given = chosen.inputs(rows=32, seed=0, module=model)
    strategy = Strategy("deep", keys_values="stale", window=(1.0, 0.5, 0.25))
    plan = fxpass.plan(model, world_size=2, strategy=strategy, **given)
    fetches = [e.declared for e in plan.exchanges if isinstance(e.declared, Fetch)]
    seen = [len(each.window[0]) for each in fetches if each.window]
    assert seen == sorted(seen, reverse=True)
    assert len(set(seen)) >= 2


def test_generations_with_windows_begin_exactly() -> None:
    model = block()
    module = parallel(model, LockstepExecutor(2), Strategy.of("pcpp"))
    for seed in (0, 1):
        for k, (sample, time) in enumerate(steps(8, seed=seed)):
            off = (module(sample, time)["sample"] - whole(model, sample, time)).abs().max()
            assert (off < 1e-5) == (k < 5)


class Masked(Tokens):
    """Attention in which a token sees none that is far away."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        h = x + timestep
        q, k, v = (layer(h).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        at = torch.arange(x.shape[1])
        near = (at[:, None] - at).abs() < 6
        return h + F.scaled_dot_product_attention(q, k, v, near).transpose(1, 2).flatten(2)


class WrittenOut(Tokens):
    """Attention with a softmax of its own."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        h = x + timestep
        q, k, v = (layer(h).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return h + ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("model", "why"), [(Masked, "the attention is masked"), (WrittenOut, "not read by torch's attention operator")]
)
def test_attention_that_cannot_have_a_window_is_named_with_the_reason(model: type[nn.Module], why: str) -> None:
    torch.manual_seed(0)
    x, time = torch.randn(1, 64, 8), torch.tensor([1.0])
    with pytest.warns(UserWarning, match=f"'pcpp': 2 exchanges of keys and values have no window.*{why}"):
        plan = fxpass.plan(model().eval(), x, time, world_size=2, strategy="pcpp")
    assert len(plan.seen_whole) == 2
    assert all(why in each.reason for each in plan.seen_whole)
    assert why in str(plan)
    assert plan.bytes_received(0) == plan.bytes_received(0, exact=False)


@pytest.mark.parametrize(
    ("theirs", "count", "nearest"), [([12, 95], 1, [12]), ([12, 99], 1, [99]), ([60, 12, 95], 2, [12, 95])]
)
def test_the_nearest_tokens_are_measured_from_the_own_ones_on_both_sides(
    theirs: list[int], count: int, nearest: list[int]
) -> None:
    found = _nearest(np.array(theirs), np.array([0, 10, 100]), count)
    assert sorted(found.tolist()) == nearest


class Guided(Tokens):
    """Tokens attend to those of an input that is the same at every step."""

    def forward(self, x: Tensor, timestep: Tensor, hint: Tensor) -> Tensor:
        q, k, v = (
            layer(h).unflatten(-1, (2, 4)).transpose(1, 2)
            for layer, h in ((self.q, x + timestep), (self.k, hint), (self.v, hint))
        )
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_keys_that_never_change_are_seen_whole() -> None:
    torch.manual_seed(0)
    network = Guided().double().eval()
    strategy = Strategy("w", keys_values="stale", window=0.2, warmup_steps=1)
    module: Any = fxpass.parallelize(network, 3, strategy=strategy, executor="lockstep")
    x, hint = torch.randn(2, 2, 48, 8, dtype=torch.float64)
    for step in range(3):
        x = x + 0.01 * torch.randn_like(x)
        time = torch.tensor([1.0 - step / 10], dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(module(x, time, hint), network(x, time, hint), rtol=1e-9, atol=1e-9)
    assert {each.declared.fresh for each in module.plan.exchanges} == {"frozen", "sync"}
