"""All ranks in this process, each run from exchange to exchange: for tests, notebooks and quality studies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..ir.exchange import Exchange, Payloads
from ..ir.program import specialize
from .executor import EXACT, Bound, PlanLike, Report, Step, device_of
from .interpreter import Act, RankProgram, Run, Site, take_all
from .past import Past, copied, results_now, retained
from .runner import Runner

#: (exchange node, exchange, source rank, destination rank, payload) -> what arrives instead
Tamper = Callable[[str, Exchange, int, int, Tensor], Tensor]


class LockstepExecutor:
    """Runs the ranks of a plan one after the other, and checks that they meet at the same exchanges.

    Args:
        tamper: changes payloads on their way (for tests: a corrupted exchange must change the output).
        check: compare the shape of each local value with what its layout says.
        compile: lower the program; only a single rank's, for compiled ranks do not stop at exchanges.

    Raises:
        ValueError: `compile` with several ranks.
    """

    def __init__(
        self,
        world_size: int,
        *,
        tamper: Tamper | None = None,
        check: bool = False,
        compile: bool = False,  # noqa: A002
    ) -> None:
        if compile and world_size > 1:
            raise ValueError(
                "executor='lockstep' interprets its ranks in turns and cannot compile them; use executor='spawn' or "
                "'distributed', or leave compile out"
            )
        self.compile = compile
        self.world_size = world_size
        self.ended: str | None = None
        self.traffic: Counter[str] = Counter()
        self.tamper = tamper
        self.check = check

    def load(self, plan: PlanLike, weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> LockstepPlan:
        return LockstepPlan(self, plan, inputs)

    def begin(self, device: torch.device) -> None:
        pass

    def failed(self, error: BaseException) -> None:
        pass

    def close(self) -> None:
        pass


class LockstepPlan:
    """A plan with the programs of all its ranks."""

    def __init__(self, executor: LockstepExecutor, plan: PlanLike, inputs: Sequence[Tensor]) -> None:
        self.executor = executor
        self.ranks = [
            Bound.of(
                RankProgram.of(specialize(plan.graph, rank), rank, check=executor.check),
                plan.program,
                device_of(inputs),
            )
            for rank in range(plan.world_size)
        ]
        self.alone = Runner(self.ranks[0].code, True) if executor.compile else None
        self.pasts: dict[int, dict[int, list[Past]]] = {}  #: by context and place of the site: one per rank

    def run(self, weights: Sequence[Tensor], inputs: Sequence[Tensor], step: Step) -> list[Tensor]:
        """Rank 0's outputs."""
        return self.run_all(weights, inputs, step)[0]

    def run_all(self, weights: Sequence[Tensor], inputs: Sequence[Tensor], step: Step = EXACT) -> list[list[Tensor]]:
        """The outputs of every rank.

        Raises:
            AssertionError: the ranks are not at the same exchange, or a payload has not the declared shape.
        """
        if self.alone is not None:
            return [self.alone.run(self.ranks[0].values(weights, inputs), Silent(), step)]
        runs = [rank.code.run(rank.values(weights, inputs)) for rank in self.ranks]
        while True:
            outputs, requests = _advance(runs)
            if outputs is not None:
                return outputs
            act, site, _ = requests[0]
            for rank, (other, there, _) in enumerate(requests):
                if (other, there.name, there.exchanges) != (act, site.name, site.exchanges):
                    raise AssertionError(f"rank 0 is at {act} {site.name}, rank {rank} at {other} {there.name}")
            if act == "wait":
                boxes = [box for _, _, box in requests]
                results = self._exchange(site, [take_all(box) for box in boxes], step)
                for box, each in zip(boxes, results, strict=True):
                    box[:] = each

    @property
    def compiled(self) -> Sequence[Report]:
        return self.alone.reports if self.alone else []

    def release(self) -> None:
        self.ranks = []
        self.pasts = {}

    def _exchange(self, site: Site, values: list[list[Tensor]], step: Step) -> list[list[Tensor]]:
        """The results of each rank."""
        if not site.stale:
            received = self._delivered(site, values)
            return [results_now(site, rank, own, received[rank]) for rank, own in enumerate(values)]
        pasts = self.pasts.setdefault(step.context, {}).setdefault(site.index, [Past() for _ in values])
        results = []
        if not step.exact:
            results = [past.results(site, rank, values[rank], step.pace) for rank, past in enumerate(pasts)]
        if step.exact or site.repeated:
            if step.exact:
                received = self._delivered(site, values)
            else:
                sent = [past.outgoing(site, rank, values[rank]) for rank, past in enumerate(pasts)]
                received = self._delivered(site.wire, sent)
            for rank, (past, own) in enumerate(zip(pasts, values, strict=True)):
                here = received[rank]
                past.arrived(site, copied(retained(site, rank, here) if step.exact else past.decoded(site, here)))
                past.remember(site, own)
                if step.exact:
                    past.all_known(site, rank, own)
            if step.exact:
                results = [results_now(site, rank, own, received[rank]) for rank, own in enumerate(values)]
        return results

    def _delivered(self, site: Site, boxes: list[list[Tensor]]) -> list[list[Payloads]]:
        """By receiving and sending rank, the payload of each exchange."""
        ranks = range(len(boxes))
        received: list[list[Payloads]] = [[[] for _ in ranks] for _ in ranks]
        for i, exchange in enumerate(site.exchanges):
            sent = [exchange.pack(src, boxes[src][i]) for src in ranks]
            for dst in ranks:
                for src in ranks:
                    payload = None if src == dst else self._carry(site, exchange, src, dst, sent[src][dst])
                    received[dst][src].append(payload)
            self.executor.traffic[exchange.role] += exchange.received(0)
        return received

    def _carry(self, site: Site, exchange: Exchange, src: int, dst: int, payload: Tensor | None) -> Tensor | None:
        if payload is None:
            assert exchange.numel(src, dst) == 0, f"{site.name}: rank {src} sends nothing to rank {dst}"
            return None
        declared = exchange.payload_shape(src, dst)
        if tuple(payload.shape) != declared or payload.dtype != exchange.dtype:
            raise AssertionError(
                f"{site.name}: rank {src} sends {payload.dtype} {tuple(payload.shape)} to rank {dst}, "
                f"{exchange} declares {exchange.dtype} {declared}"
            )
        return self.executor.tamper(site.name, exchange, src, dst, payload) if self.executor.tamper else payload


class Silent:
    """What a single rank exchanges: nothing."""

    def launch(self, site: Site, values: list[Tensor]) -> None:
        raise AssertionError(f"a single rank launches {site.name}")

    def wait(self, site: Site, values: list[Tensor]) -> list[Tensor]:
        raise AssertionError(f"a single rank waits for {site.name}")


Request = tuple[Act, Site, list[Tensor]]


def _advance(runs: list[Run]) -> tuple[list[list[Tensor]] | None, list[Request]]:
    """Take every rank to its next launch or wait: (outputs, []) if all have ended, else (None, where they stand)."""
    outputs: list[list[Tensor]] = []
    requests: list[Request] = []
    for run in runs:
        try:
            requests.append(next(run))
        except StopIteration as stop:
            outputs.append(stop.value)
    if outputs and requests:
        raise AssertionError(f"{len(outputs)} ranks have ended, the others are at {requests[0][1].name}")
    return (outputs, []) if outputs else (None, requests)
