"""One rank of a plan, run alone: its messages go through symmetric memory over a modelled link.

A side stream idles for as long as the link would take, then writes as many bytes as would arrive. So packing, sending,
traffic in this GPU's memory and overlap are real; the link is a model, and other ranks are never late.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import fxpass
from fxpass.capture import Call
from fxpass.capture.structure import WeightTable
from fxpass.ir.step import ChannelSpec, Step
from fxpass.runtime.channels import Channel, no_message
from fxpass.runtime.graphs import StepGraphs, cuda_recorder
from fxpass.runtime.messages import Message
from fxpass.runtime.step_runner import StepRunner
from fxpass.runtime.symmetric_memory import SymmetricChannel, SymmetricMemory, buffer_places


@dataclass(frozen=True)
class Link:
    """A model of the link that carries a rank's messages."""

    bandwidth: float  #: bytes per second that a rank receives
    latency: float  #: seconds per message, regardless of its size

    def seconds(self, size: int) -> float:
        return self.latency + size / self.bandwidth


#: roughly what collectives reach between the GPUs of one machine
LINKS = {"nvlink": Link(350e9, 15e-6), "pcie": Link(20e9, 20e-6)}


class Loopback(SymmetricMemory):
    """Symmetric memory of one rank without other ranks.

    All other ranks share one piece of memory, which takes what this one sends. What arrives is copied from there.
    """

    def __init__(self, specs: Sequence[ChannelSpec], rank: int, world: int, device: torch.device, link: Link) -> None:
        self.link = link
        size, _ = buffer_places(specs, world)
        own, others = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
        super().__init__(specs, [own if r == rank else others for r in range(world)], rank, 600.0)

    def _prepare(self, specs: Sequence[ChannelSpec], flags: Sequence[Tensor]) -> None:
        self._cuda = self.device.type == "cuda"
        self._cycles = cycles_per_second() if self._cuda else 0.0
        self._free = 0.0  #: on CPUs: when the link will have carried all messages so far
        self._arrived: dict[int, Any] = {}  #: by channel: an event, or on CPUs a time
        self._sizes = [_received(spec, self.rank) for spec in specs]
        if self._cuda:
            super()._prepare(specs, flags)

    @contextmanager
    def sending(self, channel: int, packed: Any, *, last: bool) -> Iterator[None]:
        if not self._cuda:
            yield
            return
        here = torch.cuda.current_stream(self.device)
        self._held.append(packed)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            yield
        if last:  # nothing is under way between two steps
            here.wait_stream(self._stream)
            self._held.clear()

    def signal(self, channel: int) -> None:
        pass

    def copy(self, channel: int, parity: int, sources: Sequence[Tensor], targets: Sequence[Sequence[Tensor]]) -> None:
        """The message travels, and as many bytes arrive."""
        if self._cuda:
            super().copy(channel, parity, sources, targets)
        else:
            torch._foreach_copy_(list(targets[parity]), list(sources))
        size = self._sizes[channel]
        seconds = self.link.seconds(size)
        start = self.places[channel][parity][self.rank][0]
        if self._cuda:
            torch.cuda._sleep(int(seconds * self._cycles))
            self._arrived[channel] = torch.cuda.Event()
        else:
            self._free = max(self._free, time.perf_counter()) + seconds
            self._arrived[channel] = self._free
        other = self.peers[(self.rank + 1) % self.world]
        self.peers[self.rank][start : start + size].copy_(other[start : start + size])
        if self._cuda:
            self._arrived[channel].record(self._stream)

    def wait(self, channel: int) -> None:
        if self._cuda:
            self._arrived[channel].wait(torch.cuda.current_stream(self.device))
        elif channel in self._arrived:
            time.sleep(max(0.0, self._arrived[channel] - time.perf_counter()))

    def check(self) -> None:
        pass


def _received(spec: ChannelSpec, rank: int) -> int:
    """Bytes that a rank receives in a step that sends."""
    own = spec.place(rank)
    others = (place for place in range(len(spec.members(rank))) if place != own)
    return sum(Message(spec.exchanges, place, own).size for place in others)


class Silent:
    """A channel for a rank without exchanges: nothing is sent, and the same buffers are received again."""

    lends = False

    def __init__(self, spec: ChannelSpec, rank: int, device: torch.device) -> None:
        self._buffers = no_message(spec, spec.place(rank), device)

    def put(self, packed: Any) -> None:
        pass

    def ready(self) -> bool:
        return True

    def get(self) -> list[Tensor]:
        return list(self._buffers)

    def close(self) -> None:
        pass


class OneRank:
    """The program of one rank of a plan, run alone.

    Args:
        link: carries the messages; None: there are no exchanges.
        inductor, graph: how its steps are compiled.
    """

    def __init__(
        self,
        plan: fxpass.Plan,
        rank: int,
        model: nn.Module,
        call: Call,
        link: Link | None,
        *,
        inductor: bool = False,
        graph: bool = False,
    ) -> None:
        (self.device,) = {each.device for each in model.parameters()}
        self.rank, self.world, self.link = rank, plan.world_size, link
        self.runner = StepRunner.of(plan, rank, self.device, Counter(), compile=inductor)
        self.runner.open(0, self.channels())
        self.weights = WeightTable(model, list(plan.program.weights.values())).tensors()
        self.call = call
        self.graphs = StepGraphs([self.runner], 0, self.device, cuda_recorder(self.device)) if graph else None

    def channels(self) -> Sequence[Channel]:
        specs = self.runner.specs
        if self.link is None:
            return [Silent(spec, self.rank, self.device) for spec in specs]
        memory = Loopback(specs, self.rank, self.world, self.device, self.link)
        return [SymmetricChannel(memory, i, spec) for i, spec in enumerate(specs)]

    def step(self, step: Step) -> list[Tensor]:
        mode = self.runner.mode(replace(step, context=0))
        if self.graphs:
            return self.graphs.run(self.weights, self.call.tensors, mode, step.pace)[0]
        return self.runner.run(self.weights, self.call.tensors, 0, mode, step.pace)


def cycles_per_second() -> float:
    """Of `torch.cuda._sleep`."""
    cycles = 100_000_000
    torch.cuda._sleep(cycles)
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    torch.cuda._sleep(cycles)
    ended.record()
    ended.synchronize()
    return cycles / (began.elapsed_time(ended) / 1e3)


def graphed(function: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    """A function as a CUDA graph, after some runs without."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    return graph.replay
