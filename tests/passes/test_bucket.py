"""bucket: fewer messages, the same numbers."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fxpass.capture import capture
from fxpass.ir import ops
from fxpass.ir.exchange import Payloads
from fxpass.ir.fetch import Fetch
from fxpass.ir.layout import Layout, PerRank, full
from fxpass.ir.program import exchanges_of
from fxpass.ir.verify import verify
from fxpass.passes.bucket import bucket, order_of
from fxpass.passes.normalize import normalize
from fxpass.passes.partition import partition
from fxpass.passes.rules import RULES
from fxpass.runtime.messages import ALIGNMENT, Message
from tests.passes.harness import cut, evenly, lockstep, output_of
from tests.properties import examples, given

aten = torch.ops.aten


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        return y, x * 2, y + x


def partitioned(model: nn.Module, x: Tensor, layout: Layout) -> fx.Graph:
    program = normalize(capture(model, x))
    return partition(program.graph, len(layout.rows), {program.inputs[0]: layout}, RULES)


def messages(graph: fx.Graph) -> list[list[str]]:
    """The roles of what travels together, in order."""
    return [[each.role for each in declared] for _, declared in exchanges_of(graph)]


def test_keys_and_values_share_a_message_and_so_do_outputs() -> None:
    graph = partitioned(Attention(), torch.randn(2, 8, 6), evenly(1, 8, 2))
    assert messages(graph) == [["keys_values"], ["keys_values"], ["output"], ["output"], ["output"]]
    assert messages(bucket(graph)) == [["keys_values", "keys_values"], ["output", "output", "output"]]


def test_an_exchange_that_depends_on_another_waits_for_it() -> None:
    model = nn.Sequential(nn.SiLU(), nn.Conv2d(3, 3, 3, padding=1), nn.SiLU(), nn.Conv2d(3, 3, 3, padding=1))
    graph = partitioned(model, torch.randn(1, 3, 8, 6), evenly(2, 8, 2))
    assert messages(bucket(graph)) == [["halo"], ["halo"], ["output"]]


def test_the_halo_of_an_input_needs_no_exchange() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 5, padding=2, stride=2), nn.SiLU(), nn.Conv2d(3, 3, 3, padding=1))
    graph = partitioned(model, torch.randn(1, 3, 16, 6), evenly(2, 16, 2))
    assert messages(graph) == [["halo"], ["output"]]


def gather_of(graph: fx.Graph, x: fx.Node, shape: tuple[int, ...] = (4, 3)) -> fx.Node:
    halves = cut(0, (0, 2), (2, 4)).rows
    declared = Fetch("realign", shape, torch.float32, 2, dim=0, have=halves, want=full(4, 2))
    args: Any = ((x,), (declared,))
    node = graph.call_function(operator.getitem, (graph.call_function(ops.exchange, args), 0))
    node.meta = {"shape": shape, "dtype": torch.float32}
    return node


def half_of(graph: fx.Graph, x: fx.Node) -> fx.Node:
    layout = cut(0, (0, 2), (2, 4))
    args: Any = (x, 0, PerRank(layout.rows))
    node = graph.call_function(ops.take, args)
    node.meta = {"shape": (4, 3), "dtype": torch.float32, "layout": layout}
    return node


def hand_made(chained: bool) -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta = {"shape": (4, 3), "dtype": torch.float32}
    first = gather_of(graph, half_of(graph, x))
    y = graph.call_function(aten.neg.default, (first if chained else x,))
    y.meta = dict(x.meta)
    second = gather_of(graph, half_of(graph, y))
    graph.output((first, second))
    return graph


def test_an_exchange_waits_past_its_place_for_one_that_is_ready_before_its_result_is_used() -> None:
    graph = bucket(hand_made(chained=False))
    verify(graph, "partitioned", 2)
    assert messages(graph) == [["realign", "realign"]]
    x = torch.randn(4, 3)
    for env in lockstep(graph, 2, {"x": x}):
        assert all(torch.equal(a, b) for a, b in zip(env[output_of(graph)], (x, -x), strict=True))


def test_an_exchange_of_what_another_brings_is_a_message_of_its_own() -> None:
    graph = bucket(hand_made(chained=True))
    assert messages(graph) == [["realign"], ["realign"]]
    x = torch.randn(4, 3)
    for env in lockstep(graph, 2, {"x": x}):
        assert torch.equal(env[output_of(graph)][1], -x)


class Parallel(nn.Module):
    """Branches of a few exchanges each, side by side or one behind the other."""

    def __init__(self, kinds: list[str], chained: list[bool]) -> None:
        super().__init__()
        make = {
            "conv": lambda: nn.Conv2d(4, 4, 3, padding=1),
            "norm": lambda: nn.GroupNorm(2, 4),
            "mean": Mean,
            "shuffle": Mixed,
        }
        self.branches = nn.ModuleList(make[kind]() for kind in kinds)
        self.chained = chained

    def forward(self, x: Tensor) -> list[Tensor]:
        results, last = [], x
        for branch, chained in zip(self.branches, self.chained, strict=True):
            last = branch(last if chained else x)
            results.append(last)
        return results


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean((2, 3), keepdim=True)


class Mixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(2).transpose(1, 2) @ x.flatten(2)).mean(-1).unflatten(1, x.shape[2:])[:, None] + x


@examples(25)
@given(st.data())
def test_bucketing_keeps_the_values_and_sends_fewer_messages(data: st.DataObject) -> None:
    kinds = data.draw(st.lists(st.sampled_from(["conv", "norm", "mean", "shuffle"]), min_size=1, max_size=5))
    model = Parallel(kinds, [data.draw(st.booleans()) for _ in kinds])
    program = normalize(capture(model, torch.randn(1, 4, 8, 5)))
    x = torch.randn(1, 4, 8, 5)
    before = partition(program.graph, 2, {program.inputs[0]: evenly(2, 8, 2)}, RULES)
    after = bucket(before)
    verify(after, "partitioned", 2)
    assert len(messages(after)) <= len(messages(before))
    assert messages(after) == messages(bucket(after))  # nothing is left to do
    flat = [role for group in messages(before) for role in group]
    assert Counter(flat) == Counter(role for group in messages(after) for role in group)  # none is lost
    values = {str(n.target): x for n in before.find_nodes(op="placeholder")}
    values |= {name: model.get_parameter(path).detach() for name, path in program.weights.items()}
    for one, other in zip(lockstep(before, 2, values), lockstep(after, 2, values), strict=True):
        for a, b in zip(one[output_of(before)], other[output_of(after)], strict=True):
            assert torch.equal(a, b)


class Heads(nn.Module):
    """Attention of two heads: operands are transposed views [B, H, N, D] of projections [B, N, H D]."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(2, 8, 2, 3).transpose(1, 2) for f in (torch.sin, torch.cos, torch.tanh))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 8, 6)


def test_a_transposed_value_travels_as_it_lies_in_memory() -> None:
    graph = bucket(partitioned(Heads(), torch.randn(2, 8, 6), evenly(1, 8, 2)))
    (_, (key, value)), (_, (output,)) = exchanges_of(graph)
    assert key.order == value.order == (0, 2, 1, 3)
    assert output.order == ()
    message = Message((key, value), 0, 1)
    own: Payloads = [torch.randn(2, 4, 2, 3).transpose(1, 2) for _ in range(2)]
    buffer = torch.zeros(3 * ALIGNMENT + message.size, dtype=torch.uint8)[ALIGNMENT:]
    message.write(own, buffer, ALIGNMENT)
    assert not buffer[:ALIGNMENT].any()
    assert not buffer[-ALIGNMENT:].any()
    arrived = message.read(buffer, ALIGNMENT)
    assert [x.stride() for x in arrived if x is not None] == [x.stride() for x in own if x is not None]
    torch.testing.assert_close(arrived, own, rtol=0, atol=0)


@given(st.permutations(range(4)))
def test_the_order_of_any_transposition_is_that_of_its_strides(dims: list[int]) -> None:
    value = torch.empty(2, 3, 4, 5).permute(dims)
    graph = fx.Graph()
    node = graph.call_function(aten.permute.default, (graph.placeholder("x"), dims))
    node.meta["shape"] = tuple(value.shape)
    assert list(order_of(node) or range(4)) == sorted(range(4), key=value.stride, reverse=True)
