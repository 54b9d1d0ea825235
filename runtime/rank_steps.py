"""Runs the steps of the rank in this process: operator by operator, or as CUDA graphs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..ir.step import Mode
from .graphs import StepGraphs, cuda_recorder
from .network import Network
from .step_runner import StepRunner

log = logging.getLogger("fxpass")


class RankSteps:
    """The steps of one plan on this process's rank.

    Args:
        graph: record steps as CUDA graphs, if all GPUs can map each other's memory. All ranks then make it in the same
            order, for they agree on that.
    """

    def __init__(self, runner: StepRunner, network: Network, *, graph: bool) -> None:
        self.runner = runner
        self._network = network
        self._graphs: dict[int, StepGraphs] = {}  #: by context
        device = runner.device
        self._record = None
        if graph and (not runner.specs or network.maps(runner.specs, device)):
            self._record = cuda_recorder(device)
        elif graph and network.board.rank == 0:
            log.warning(
                "steps run without CUDA graphs: not all GPUs of the ranks can map each other's memory (other machines, "
                "no peer access, several ranks on one GPU)"
            )

    def run(
        self, weights: Sequence[Tensor], inputs: Sequence[Tensor], context: int, mode: Mode, pace: float
    ) -> list[Tensor]:
        """The flat outputs of a step, once the device has computed them.

        Raises:
            RankError: another rank failed, ended, or did not answer in time.
        """
        runner = self.runner
        with on_device(runner.device):
            if self._record:
                if context not in self._graphs:
                    self._graphs[context] = StepGraphs([runner], context, runner.device, self._record)
                (outputs,) = self._graphs[context].run(weights, inputs, mode, pace)
            else:
                outputs = runner.run(weights, inputs, context, mode, pace)
            self._network.settle(runner.device)
        return outputs

    def forget_graphs(self) -> None:
        """Destroy the graphs. They read messages and state, so they go first."""
        self._graphs.clear()

    def close(self) -> None:
        """Destroy the graphs, receive what is in flight, and forget all contexts. All ranks call it."""
        self.forget_graphs()
        self.runner.close()


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels that are not torch's own are launched on the current device: make it this one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
