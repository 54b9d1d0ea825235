"""Prices of operators."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import pytest
import torch

from fxpass.ir import comm
from fxpass.ir.fetch import Fetch
from fxpass.ir.layout import Rows
from fxpass.ir.ops import take
from fxpass.ir.program import calls, layout_of
from fxpass.ir.step import Mode
from fxpass.passes.cost import node_flops
from fxpass.passes.lower_comm import StepPrograms
from fxpass.passes.targets import Device, find
from fxpass.predict.count import count, count_communication
from fxpass.predict.price import Prices, slowdown
from tests.inspect.plans import planned, small

SLOW = Device("slow", "", "cpu", {"float32": 1e9}, bandwidth=1e15)  #: computing takes time, memory none
NARROW = Device("narrow", "", "cpu", {"float32": 1e15}, bandwidth=1e6)


def test_operators_bound_by_computing_take_their_flops_on_every_rank() -> None:
    made = planned(world=3)
    prices = Prices(SLOW, 3)
    for node in calls(StepPrograms(made.graph, 0)["exact"].graph):
        if flops := node_flops(node):
            seconds = torch.tensor(prices.of(node).seconds).expand(3).tolist()
            assert seconds == pytest.approx([node_flops(node, rank) / 1e9 for rank in range(3)]), node
            assert flops


def test_operators_bound_by_memory_take_the_bytes_of_operands_and_results() -> None:
    made = planned(world=2)
    prices = Prices(NARROW, 2)
    (silu,) = (n for n in calls(StepPrograms(made.graph, 0)["exact"].graph) if "silu" in n.name)
    local = [prod(layout_of(silu).local_shape(silu.meta["shape"], rank)) for rank in range(2)]
    seconds = torch.tensor(prices.of(silu).seconds).expand(2).tolist()
    assert seconds == pytest.approx([2 * 4 * size / 1e6 for size in local])


def test_operators_that_the_device_has_a_rate_of_take_their_elements() -> None:
    made = planned(world=2)
    (silu,) = (n for n in calls(StepPrograms(made.graph, 0)["exact"].graph) if "silu" in n.name)
    local = [prod(layout_of(silu).local_shape(silu.meta["shape"], rank)) for rank in range(2)]
    slow, fast = (replace(NARROW, elements={"silu": rate, "gelu": 1.0}) for rate in (10.0, 1e9))
    seconds = torch.tensor(Prices(slow, 2).of(silu).seconds).expand(2).tolist()
    assert seconds == pytest.approx([size / 10.0 for size in local])
    assert Prices(fast, 2).of(silu).seconds == pytest.approx(Prices(NARROW, 2).of(silu).seconds)


def test_views_cost_nothing_and_allocate_nothing() -> None:
    prices = Prices(NARROW, 2)
    for node in calls(StepPrograms(small("flux").graph, 0)["exact"].graph):
        if node.name.startswith(("permute", "reshape", "slice")):
            assert (prices.of(node).kernels, prices.of(node).allocated.sum()) == (0, 0)


def test_a_kernel_takes_its_own_time_beside_its_work() -> None:
    made = planned(world=2)
    (silu,) = (n for n in calls(StepPrograms(made.graph, 0)["exact"].graph) if "silu" in n.name)
    dear = Prices(replace(NARROW, kernel=7.0), 2).of(silu).seconds - Prices(NARROW, 2).of(silu).seconds
    assert dear == pytest.approx(7.0)


def test_the_compilers_operators_are_counted_by_running_them() -> None:
    x = torch.empty(2, 8, 4, 4)
    counted = count(torch.nn.functional.silu, (x,), {})
    assert (counted.kernels, counted.moved, counted.allocated) == (1, 2 * 1024, 1024)
    view = count(lambda a: a[:, :4].flatten(2), (x,), {})
    assert (view.kernels, view.allocated) == (0, 0)


def test_tables_of_positions_cost_nothing_the_first_time_either() -> None:
    x, rows = torch.empty(2, 64), Rows.of([3, 5, 9, 62])
    counts = [count(take, (x, 1, rows), {}) for _ in range(2)]
    assert counts[0] == counts[1]
    assert counts[0].kernels == 1


@pytest.mark.parametrize("strategy", ["displaced", "compressed", "corrected_async_gn", "pcpp", "separate_gn"])
def test_every_operator_of_an_exchange_has_a_price(strategy: str) -> None:
    made = planned(strategy, 3)
    programs = StepPrograms(made.graph, 0)
    prices = Prices(NARROW, 3)
    for mode in ("exact", "first", "steady"):
        for node in calls(programs[mode].graph):
            if getattr(node.target, "__module__", "") == comm.__name__ and node.target not in (comm.put, comm.get):
                price = prices.of(node)
                assert len(price.seconds) == 3
                assert price.kernels.any() or not price.allocated.any()


def test_attention_in_a_window_takes_the_flops_of_the_keys_that_it_sees() -> None:
    made = planned("pcpp", 3)
    (keys,) = (e.declared for e in made.exchanges if e.id == "x2.0")
    assert isinstance(keys, Fetch)
    seconds: list[list[float]] = []
    modes: tuple[Mode, ...] = ("exact", "steady")
    for mode in modes:
        nodes = calls(StepPrograms(made.graph, 0)[mode].graph)
        (attention,) = (n for n in nodes if n.name.startswith("scaled_dot_product"))
        seconds.append(np.broadcast_to(Prices(SLOW, 3).of(attention).seconds, 3).tolist())
    shares = [len(keys.window[rank]) / len(keys.want[rank]) for rank in range(3)]
    assert len(set(shares)) > 1
    assert seconds[1] == pytest.approx([all_ * share for all_, share in zip(seconds[0], shares, strict=True)])


def test_ranks_that_do_the_same_in_an_exchange_have_the_same_price() -> None:
    made = planned(world=4)
    (halo,) = {each.declared for each in made.exchanges if each.id == "x1.0"}
    counted = [count_communication(comm.unpack, halo, rank) for rank in range(4)]
    assert counted[1] == counted[2]
    found: Any = Prices(NARROW, 4).communication(comm.unpack, halo)
    assert found.seconds.tolist() == [each.moved / 1e6 for each in counted]


def test_small_results_leave_multiprocessors_idle() -> None:
    gpu = find("H100").device
    large, small_ = (slowdown(gpu.units, gpu.tiles, rows, 3072, 1) for rows in (1 << 20, 64))
    assert large == pytest.approx(1, abs=0.01)
    assert small_ > 4
    assert slowdown(SLOW.units, SLOW.tiles, 64, 3072, 1) == 1
