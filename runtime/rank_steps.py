"""Runs the steps of the ranks in this process: operator by operator, or as CUDA graphs."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..ir.mesh import Placement
from ..ir.step import ChannelSpec, Mode, Step
from .channels import Channel
from .executor import PlanLike
from .graphs import StepGraphs, cuda_recorder
from .held import Held, Holding
from .network import Network
from .step_runner import StepRunner, as_tensor, copies, drive, run_in_turns

log = logging.getLogger("fxpass")

#: Opens the channels of a context: the ends of each rank of this process.
Opener = Callable[[Sequence[ChannelSpec]], Sequence[Sequence[Channel]]]


class RankSteps:
    """The steps of one plan on the ranks of this process, which run in turn.

    Args:
        runners: of these ranks.
        opener: opens the channels of a context. All processes open the same contexts in the same order.
        network: the connection to other processes; None if all ranks are here.
        graph: record steps as CUDA graphs, if all GPUs can map each other's memory. All processes then make it in the
            same order, for they agree on that.
    """

    def __init__(
        self,
        runners: Sequence[StepRunner],
        opener: Opener,
        placement: Placement,
        network: Network | None = None,
        *,
        graph: bool = False,
    ) -> None:
        self.runners = runners
        self._opener = opener
        self._network = network
        self._graphs: dict[int, StepGraphs] = {}  #: by context
        self.device = device = runners[0].device
        self._record = None
        specs = runners[0].specs
        if graph and (not specs or (network is not None and network.maps(specs, device, placement))):
            self._record = cuda_recorder(device)
        elif graph and network is not None and network.board.rank == 0:
            log.warning(
                "steps run without CUDA graphs: not all GPUs of the ranks can map each other's memory (other machines, "
                "no peer access, several ranks on one GPU or in one process)"
            )

    def mode(self, step: Step) -> Mode:
        """The mode of a step, which counts as run from now on."""
        modes: list[Mode] = [runner.mode(step) for runner in self.runners]
        assert len(set(modes)) == 1
        return modes[0]

    def run(
        self,
        weights: Sequence[Tensor],
        inputs: Sequence[Tensor],
        context: int,
        mode: Mode,
        pace: float,
        held: Held,
        holding: Holding,
    ) -> list[list[Tensor]]:
        """The flat outputs of each rank in a step, once the device has computed them.

        Args:
            held: where ranks take values from that they have kept, and keep others, as `holding` says.

        Raises:
            AssertionError: every rank waits for another one, or a payload has not the declared shape.
            RankError: another rank failed, ended, or did not answer in time.
        """
        with on_device(self.device):
            self._open(context)
            given = held.inputs(inputs, holding, len(self.runners))
            if self._record and (len(self.runners) == 1 or not holding.takes):  # all ranks have the same inputs
                if context not in self._graphs:
                    self._graphs[context] = StepGraphs(self.runners, context, self.device, self._record)
                outputs = self._graphs[context].run(weights, given[0], mode, pace)
            else:
                outputs = self._in_turns(weights, given, context, mode, pace)
            if self._network is not None:
                self._network.settle(self.device)
        return held.outputs(outputs, holding)

    def _open(self, context: int) -> None:
        """Give a context its channels, if it is new."""
        if not self.runners[0].is_open(context):
            for runner, ends in zip(self.runners, self._opener(self.runners[0].specs), strict=True):
                runner.open(context, ends)

    def _in_turns(
        self, weights: Sequence[Tensor], given: list[list[Tensor]], context: int, mode: Mode, pace: float
    ) -> list[list[Tensor]]:
        channels = [runner.channels(context) for runner in self.runners]
        length = as_tensor(pace)
        runs = [
            runner.start(weights, own, context, mode, length) for runner, own in zip(self.runners, given, strict=True)
        ]
        given.clear()  # a step frees its inputs as it goes
        found = [drive(runs[0], channels[0])] if len(runs) == 1 else run_in_turns(runs, channels)
        for runner in self.runners:
            runner.count(mode)
        return [
            copies(outputs) if any(channel.lends for channel in ends) else outputs
            for (outputs, _), ends in zip(found, channels, strict=True)
        ]

    def forget_graphs(self) -> None:
        """Destroy the graphs. They read messages and state, so they go first."""
        self._graphs.clear()

    def close(self) -> None:
        """Destroy the graphs, receive what is in flight, and forget all contexts. All ranks call it."""
        self.forget_graphs()
        for runner in self.runners:
            runner.close()


def steps_of(
    plan: PlanLike,
    network: Network,
    device: torch.device,
    traffic: Counter[str],
    *,
    compile: bool,  # noqa: A002
    graph: bool,
    sharing: int,
) -> RankSteps:
    """The steps of the ranks of a process that has the plan.

    Args:
        traffic: counts the bytes that they receive from other processes, by role.
        sharing: the processes that share this machine's cores when they compile.
    """
    placement = plan.placement
    here = placement.ranks(network.board.rank)
    runners = [StepRunner.of(plan, rank, device, traffic, compile=compile, sharing=sharing, here=here) for rank in here]
    return RankSteps(runners, lambda specs: network.open(specs, device, placement), placement, network, graph=graph)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels that are not torch's own are launched on the current device: make it this one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
