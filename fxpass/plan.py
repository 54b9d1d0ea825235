"""Plans: one program split over n ranks, with its exchanges, their cost and their reasons."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from .described import described, summary
from .inspect.collect import snapshot
from .inspect.compare import PlanDiff, compare
from .inspect.errors import OnnxError
from .inspect.exchanges import (
    Gathered,
    PlannedExchange,
    estimated_in,
    gathered_in,
    padding_of,
    planned_in,
    uncounted_in,
)
from .inspect.explain import explain
from .inspect.html import plan_html
from .inspect.networks import to_networkx
from .inspect.onnx_export import write_onnx
from .inspect.record import Snapshot
from .ir.comm import kept_bytes
from .ir.fetch import Fetch
from .ir.layout import Layout
from .ir.mesh import Mesh, Placement
from .ir.program import Program, exchanges_of, fingerprint
from .ir.step import Mode
from .ir.strategy import Strategy
from .passes.cost import flops, node_flops, totals
from .passes.cuts import Tried
from .passes.targets import Target, find
from .planning import target_of
from .predict.memory import weights_of
from .predict.prediction import Prediction, Steps
from .runtime.state_bytes import bytes_by_channel

if TYPE_CHECKING:
    import networkx as nx


@dataclass(frozen=True)
class Plan:
    """The work and the exchanges of `world_size` ranks. All ranks derive the same plan, with the same fingerprint."""

    program: Program  #: the normalized program on whole tensors
    graph: fx.Graph  #: the partitioned graph, for all ranks
    world_size: int
    strategy: Strategy
    target: Target
    cuts: dict[str, Layout]  #: layouts of the cut values, by name of input or value
    seconds: dict[str, float]  #: wall time of `capture`, of `plan`, and of each pass of the latter
    tried: tuple[Tried, ...] = ()  #: the candidates that the search for cuts judged, in order
    groups: int = 1  #: of ranks, each of which runs different samples of the batch, or a call of its own
    calls: int = 1  #: how many calls of the program run at once, each on a group of ranks
    copies: int = 1  #: so many groups do the same: fewer ranks are faster (`strategy="auto"`)
    counts: tuple[int, ...] = ()  #: how many ranks each process runs, in turn; (): each runs one
    speeds: tuple[float, ...] = ()  #: of the ranks of a stage, to which their rows are in proportion; (): all the same
    stages: int = 1  #: of each group, which run parts of the model one after the other

    @property
    def mesh(self) -> Mesh:
        """How the ranks are arranged: groups that run different samples, each of stages that run parts of the model,
        each of ranks that run patches."""
        return Mesh(self.groups, self.world_size // self.groups // self.stages, self.stages)

    @property
    def placement(self) -> Placement:
        """Which process runs which ranks."""
        return Placement(self.counts or (1,) * self.world_size)

    @property
    def relative_speeds(self) -> tuple[float, ...]:
        """Of each process, relative to the fastest."""
        ranks = self.speeds * (self.world_size // len(self.speeds)) if self.speeds else (1.0,) * self.world_size
        each = self.placement.sums(ranks)
        return tuple(speed / max(each) for speed in each)

    @property
    def arrangement(self) -> str:
        """The ranks in words, for messages: "4 ranks (2 groups of 2 patches)"."""
        ranks = f"{self.world_size} rank{'s' * (self.world_size > 1)}"
        if self.placement.several:
            ranks += f" on {len(self.counts)} process{'es' * (len(self.counts) > 1)}"
        if self.groups == self.stages == 1:
            return ranks
        patches = f"{self.mesh.patches} patch{'es' * (self.mesh.patches > 1)}"
        each = f"{self.stages} stages of {patches}" if self.stages > 1 else patches
        same = f", {self.copies} groups do the same" if self.copies > 1 else ""
        return f"{ranks} ({f'{self.groups} groups of ' * (self.groups > 1)}{each}{same})"

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that the ranks must agree on."""
        found = fingerprint(self.graph)
        dealt = self.counts, self.speeds
        return hashlib.sha256(f"{found} {dealt}".encode()).hexdigest() if any(dealt) else found

    def save(self, path: str | Path) -> None:
        """Write the plan to a file, for `parallelize(…, plan=path)`; the file's plans of other calls stay.

        Raises:
            OSError: the file cannot be written.
            ValueError: the file is there and holds no plans, or this plan runs several calls at once.
        """
        from .saved import save

        if self.calls > 1:
            raise ValueError(f"this plan runs {self.calls} calls at once, and cannot be saved; plan with cfg=1")
        save(self, path)

    @property
    def attempts(self) -> int:
        """Number of candidates that the search for cuts judged."""
        return len(self.tried)

    @cached_property
    def exchanges(self) -> tuple[PlannedExchange, ...]:
        return tuple(planned_in(self.graph))

    @property
    def fallbacks(self) -> tuple[PlannedExchange, ...]:
        """Exchanges that gather operands of operators that could not be split; each has a reason."""
        return tuple(e for e in self.exchanges if e.role == "fallback")

    @cached_property
    def gathered(self) -> tuple[Gathered, ...]:
        """The operators that `fallbacks` are for, each listed once."""
        return gathered_in(self.graph)

    @property
    def seen_whole(self) -> tuple[PlannedExchange, ...]:
        """Exchanges of stale keys and values without a window, although the strategy has windows; each has a reason."""
        return tuple(
            e
            for e in self.exchanges
            if self.strategy.windows and isinstance(e.declared, Fetch) and e.declared.fresh == "stale"
            if e.role == "keys_values" and not e.declared.window
        )

    @cached_property
    def flops_total(self) -> int:
        """Floating-point operations of the model: matrix products, convolutions, attention."""
        return self.calls * flops(self.program.graph)

    @cached_property
    def flops_per_rank(self) -> tuple[int, ...]:
        """Floating-point operations of each rank, replicated work included."""
        return totals(self.graph, self.world_size, node_flops)[0]

    @cached_property
    def weights(self) -> int:
        """Bytes of the weights and constants of the whole model."""
        return weights_of(self.program, self.graph, range(self.world_size))

    @cached_property
    def estimated(self) -> dict[str, int]:
        """Custom operators of unknown work, and how many there are, by name. Each counts as the matrix product of its
        two largest operands."""
        return estimated_in(self.program.graph)

    @cached_property
    def uncounted(self) -> dict[str, int]:
        """Operators of unknown work that cannot be estimated, and how many there are, by name. `flops_total`,
        `flops_per_rank` and `bound` leave them out."""
        return uncounted_in(self.program.graph, self.gathered)

    @property
    def bound(self) -> float:
        """Upper bound of the speed-up: all work on the fastest process over the time of the slowest, as far as it is
        counted. The times of stages that work one after the other add up."""
        work, mesh = self.placement.sums(self.flops_per_rank), self.mesh
        stages = [[0.0] for _ in range(mesh.stages)]
        for ranks, each, speed in zip(self.placement, work, self.relative_speeds, strict=True):
            stages[mesh.stage(ranks[0])].append(each / speed)
        slowest = (max if self.strategy.overlaps else sum)(map(max, stages))
        return self.flops_total / slowest if slowest else sum(self.relative_speeds)

    @cached_property
    def bytes_by_role(self) -> dict[str, int]:
        """Bytes received by all ranks together."""
        total: Counter[str] = Counter()
        for exchange in self.exchanges:
            total[exchange.role] += exchange.bytes
        return dict(total)

    @cached_property
    def bytes_received_per_rank(self) -> tuple[dict[str, int], ...]:
        """Bytes that each rank receives in one exact step, by role."""
        return tuple(self.bytes_received(rank) for rank in range(self.world_size))

    def bytes_received(
        self, rank: int, *, exact: bool = True, exposed: bool = False, half: bool = False
    ) -> dict[str, int]:
        """Bytes that a rank receives in one step, by role.

        Args:
            exact: in an exact step; else in a displaced one.
            exposed: only bytes that the same step waits for.
            half: count 2 bytes per floating-point number.
        """
        total: Counter[str] = Counter()
        for exchange in self.exchanges:
            declared = exchange.declared if exact else exchange.declared.wire
            if exact or declared.fresh == "sync" or (declared.repeated and not exposed):
                count, dtype = exchange.received(rank, exact=exact), declared.dtype
                total[exchange.role] += count * 2 // dtype.itemsize if half and dtype.is_floating_point else count
        return dict(total)

    @cached_property
    def bytes_received_per_rank_displaced(self) -> tuple[dict[str, int], ...] | None:
        """Bytes that each rank receives in one displaced step, by role; None if all steps are exact."""
        if self.strategy.exact:
            return None
        return tuple(self.bytes_received(rank, exact=False) for rank in range(self.world_size))

    def padding_received(self, rank: int, *, exact: bool = True) -> int:
        """Bytes of padding that a rank receives in one step over NCCL, in addition to `bytes_received`.

        Parts of all-gathers are padded to the largest part, payloads to a multiple of 16.
        """
        return sum(padding_of(declared, rank, exact=exact) for _, declared in exchanges_of(self.graph))

    @property
    def state_bytes_per_rank(self) -> tuple[int, ...]:
        """Bytes that each rank holds from one step to the next, per guidance branch.

        These are messages that the next step reads, and what forecasts, estimates and codes need of the steps before.
        `state_bytes_by_channel` counts the buffers of each kind of channel instead.
        """
        nodes = [declared for _, declared in exchanges_of(self.graph)]
        return tuple(sum(kept_bytes(declared, rank) for declared in nodes) for rank in range(self.world_size))

    @cached_property
    def state_bytes_by_channel(self) -> Mapping[str, tuple[int, ...]]:
        """Bytes that each process holds from one step to the next, per guidance branch, by kind of channel.

        Kinds: `in one process` (of each rank), `shared memory`, `gloo`, `NCCL`, and `symmetric memory` unless the
        ranks are a mesh or some share a process.
        """
        return bytes_by_channel(self.graph, self.placement)

    @property
    def exact_steps(self) -> tuple[int, int] | None:
        """Exact steps at the beginning of a generation and at its end; None if all steps are exact."""
        return None if self.strategy.exact else (max(1, self.strategy.warmup_steps), self.strategy.cooldown_steps)

    def snapshot(self, rank: int = 0, model: str = "") -> Snapshot:
        """The graph of a rank as frozen data. Raises `ValueError` if there is no such rank."""
        return snapshot(
            self.program, self.graph, world=self.world_size, target=self.target, cuts=self.cuts,
            rank=rank, model=model, stage="schedule", strategy=self.strategy.name,
        )  # fmt: skip

    def explain(self, node: str, rank: int = 0) -> str:
        """Why a node is as it is: its rule, where its split comes from, its exchanges, and what the search tried.

        Args:
            node: a node of the graph, an operator of the captured program, or an exchange (`x3.1`).

        Raises:
            ValueError: nothing has this name; the message suggests near ones.
        """
        return explain(self.program, self.snapshot(rank), node, self.strategy, self.tried)

    def to_networkx(self, rank: int = 0) -> nx.DiGraph[str]:
        """The graph of a rank as a networkx graph; `docs/inspect.md` lists the attributes of its nodes and edges.

        Raises `ValueError` if there is no such rank, `MissingExtraError` if networkx is not installed.
        """
        return to_networkx(self.snapshot(rank))

    def to_onnx(
        self,
        path: str | Path,
        rank: int = 0,
        mode: Mode = "exact",
        *,
        model: nn.Module | None = None,
        weights: str | None = None,
    ) -> None:
        """Write the program of one step of a rank as an ONNX model; `docs/inspect.md` says what it holds.

        Args:
            mode: "exact"; "first" for a displaced step after an exact one; "steady" for one after a displaced one; the
                last two with " unpaced" added: without forecasts.
            model: its weights are written to the file `weights` beside `path`, which is the same for all ranks; None:
                weights are inputs.

        Raises:
            ValueError: there is no such rank or mode, the weights of `model` have no values, or `weights` is no name
                of another file in the folder of `path`.
            OnnxError: an operator has no ONNX form (a `NotImplementedError`), or the plan has stages.
            MissingExtraError: onnx or onnxscript is not installed.
            OSError: a file cannot be written.
        """
        if self.stages > 1:
            raise OnnxError("transfers between stages have no ONNX form; plan with stages=1")
        snapshot = self.snapshot(rank)
        write_onnx(self.program, self.graph, snapshot, Path(path), mode, model=model, weights=weights)

    def predict(
        self, target: str | Target | None = None, link: str | None = None, *, graphs: bool = False
    ) -> Prediction:
        """Simulate all ranks: the time of a step and of a generation, and the memory of a device.

        Args:
            target: a device, or a file that describes one; None: what the plan was made for.
            link: the link between the ranks; None: the one that the device names.
            graphs: kernels are launched together, as CUDA graphs do, and not one by one by the host.

        Raises:
            ValueError: there is no such target or link; the message suggests the nearest.
        """
        machine = self.target if target is None else target_of(target, self.program, link)
        if target is None and link is not None:
            machine = replace(machine, link=find("auto", link).link)
        return self.priced(machine, graphs=graphs).predict(self.strategy, machine, graphs=graphs)

    def priced(self, machine: Target | None = None, *, graphs: bool = False) -> Steps:
        """The steps of the processes, priced for a device: by default the one that the plan was made for."""
        return Steps.of(
            self.program, self.graph, self.world_size, machine or self.target, graphs=graphs,
            placement=self.placement, speeds=self.relative_speeds if self.speeds else (),
        )  # fmt: skip

    def diff(self, other: Plan) -> PlanDiff:
        """What differs from this plan to `other`: settings, cuts, exchanges, fallbacks. It prints as a list."""
        return compare(self.describe(), other.describe())

    def _repr_html_(self) -> str:
        return plan_html(self.describe())

    def describe(self) -> dict[str, Any]:
        """The plan as plain data, for JSON."""
        return described(self)

    def __str__(self) -> str:
        return summary(self)
