"""Plans for the tests of the runtime: the real passes with a plain cut, so that no planner is needed."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxpass.ir.inputs import moving_names
from fxpass.ir.layout import Layout, PerRank, even
from fxpass.ir.mesh import Placement
from fxpass.ir.program import Program, fingerprint
from fxpass.ir.strategy import Strategy
from fxpass.passes.displace import displace
from fxpass.passes.narrow import narrow
from fxpass.passes.normalize import normalize
from fxpass.passes.partition import partition
from fxpass.passes.rules import RULES
from fxpass.passes.schedule import schedule
from fxpass.runtime.calls.engine import Engine
from fxpass.runtime.calls.module import ParallelModule
from fxpass.runtime.executor import Executor

SYNC = Strategy()


@dataclass(frozen=True, eq=False)
class CutPlan:
    """The first input that has them is cut along its rows (dim -2)."""

    program: Program
    graph: fx.Graph
    world_size: int
    fingerprint: str
    exact_steps: tuple[int, int] | None = None
    calls: int = 1
    counts: tuple[int, ...] = ()  #: ranks of each process; (): each has one

    @property
    def placement(self) -> Placement:
        return Placement(self.counts) if self.counts else Placement.one_each(self.world_size)


def cut_plan(program: Program, world_size: int, strategy: Strategy = SYNC) -> CutPlan:
    program = normalize(program)
    seeds = {}
    for node in program.graph.nodes:
        if node.name == program.inputs[0]:
            dim = len(node.meta["shape"]) - 2
            seeds[node.name] = Layout(dim, even(node.meta["shape"][dim], world_size, 2))
    graph = partition(program.graph, world_size, seeds if world_size > 1 else {}, RULES)
    graph = displace(graph, strategy, moving_names(program), world_size)
    graph = schedule(narrow(graph, strategy.windows))
    exact_steps = None if strategy.exact else (strategy.warmup_steps, strategy.cooldown_steps)
    return CutPlan(program, graph, world_size, fingerprint(graph), exact_steps)


class Block(nn.Module):
    """A small denoiser with every kind of exchange: halos, moments, keys and values."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, channels, 3, padding=1)
        self.norm = nn.GroupNorm(4, channels)
        self.down = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.conv_out = nn.Conv2d(channels, 4, 3, padding=1)
        self.scale = 1.0
        self.config = {"channels": channels}

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype

    def forward(self, sample: Tensor, timestep: Tensor, *, gain: float = 1.0, return_dict: bool = True) -> Any:
        h = self.conv_in(sample) + timestep.view(-1, 1, 1, 1)
        h = self.down(nn.functional.silu(self.norm(h)))
        tokens = h.flatten(2).transpose(1, 2)
        tokens = tokens + nn.functional.scaled_dot_product_attention(
            self.query(tokens), self.key(tokens), self.value(tokens)
        )
        h = tokens.transpose(1, 2).reshape(h.shape)
        h = nn.functional.interpolate(h, scale_factor=2.0)
        result = self.conv_out(h) * (gain * self.scale)
        return {"sample": result} if return_dict else (result,)


class Pipeline(SimpleNamespace):
    """What `parallelize` needs of a pipeline: a denoiser and a scheduler."""


def block(seed: int = 0, channels: int = 16) -> Block:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Block(channels).eval()


def inputs(rows: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, rows, 8, generator=generator), torch.tensor([0.3])


def parallel(model: nn.Module, executor: Executor, strategy: Strategy = SYNC) -> ParallelModule:
    """`model` on the ranks of `executor`, cut along its rows."""
    planner = lambda program: cut_plan(program, executor.world_size, strategy)  # noqa: E731
    return ParallelModule(model, Engine(model, planner, executor))


def steps(count: int, rows: int = 16, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """The inputs of one generation: the sample drifts, the timestep falls."""
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(2, 4, rows, 8, generator=generator)
    drift = torch.randn(2, 4, rows, 8, generator=generator)
    return [(sample + 0.1 * k * drift, torch.tensor([0.9 - 0.1 * k])) for k in range(count)]


def whole(model: nn.Module, *args: Tensor) -> Tensor:
    with torch.no_grad():
        return model(*args)["sample"]


def broken_on_rank_1(plan: CutPlan) -> CutPlan:
    """The last reshape gets a wrong shape on rank 1."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(plan.graph, {}))
    node = [n for n in graph.nodes if n.target is torch.ops.aten.reshape.default][-1]
    node.args = (node.args[0], PerRank((node.args[1], [7], *(node.args[1],) * (plan.world_size - 2))))
    return CutPlan(plan.program, graph, plan.world_size, "broken", plan.exact_steps)
