"""Project from one GPU to several: time one rank's program while its messages come from a modelled link.

    python -m benchmarks.gpu [--models sdxl] [--size 2048] [--ranks 2 4 8] [--links nvlink pcie] [--compile]

A published model at its usual size, with random weights, runs whole; then the slowest rank's program of an n-rank plan
runs alone. Its messages are packed, sent and unpacked as usual, but on a *loopback*: a side stream idles for as long as
the link would take, then copies as many bytes as would arrive. Measured are compute, packing, traffic in this GPU's
memory, and overlap; modelled is the link. Not included are NCCL's own kernels, which occupy some multiprocessors, and
late ranks: these are projections.

    exact      all ranks in lockstep on this GPU: error against the unsplit model, and that model's own against float32
    ceiling    the displaced program without exchanges: the same operators, on messages that stay the same
    displaced  steady steps of the strategy
    sync       exact steps

It also runs on CPUs, where the loopback sleeps and the numbers mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxpass
from benchmarks.displaced import STALE
from benchmarks.harness import CEILING, DISPLACED, heading, without_exchanges
from fxpass.capture import Call
from fxpass.capture.structure import WeightTable
from fxpass.ir.program import Program
from fxpass.ir.step import EXACT, ChannelSpec, Step
from fxpass.models.catalog import get, load
from fxpass.models.small import output_tensors
from fxpass.passes.cost import flops
from fxpass.runtime.lockstep import LockstepExecutor
from fxpass.runtime.process_group import GroupChannel
from fxpass.runtime.step_runner import StepRunner

WARM = 2  #: untimed steps
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


@dataclass(frozen=True)
class Link:
    """A model of the link that carries a rank's messages."""

    bandwidth: float  #: bytes per second that a rank receives
    latency: float  #: seconds per message, regardless of its size

    def seconds(self, size: int) -> float:
        return self.latency + size / self.bandwidth


#: roughly what NCCL's collectives reach between the GPUs of one machine
LINKS = {"nvlink": Link(350e9, 15e-6), "pcie": Link(20e9, 20e-6)}


# -- a loopback in place of a process group ------------------------------------------------------------------------


class Loopback:
    """A group whose other ranks send what this one sends; messages queue on one link."""

    def __init__(self, device: torch.device, link: Link) -> None:
        self.link = link
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.cycles = _cycles_per_second() if self.stream else 0.0
        self.free = 0.0  #: without a stream: when the link will have carried all messages so far

    def _allgather_base(self, receive: Tensor, send: Tensor) -> Arrival:
        return self._carried(receive, send, receive.numel() - send.numel())

    def alltoall_base(self, receive: Tensor, send: Tensor, receives: Sequence[int], sends: Sequence[int]) -> Arrival:
        return self._carried(receive, send, receive.numel())

    def _carried(self, receive: Tensor, send: Tensor, size: int) -> Arrival:
        seconds = self.link.seconds(size)
        if self.stream is None:
            self.free = max(self.free, time.perf_counter()) + seconds
            _fill(receive, send)
            return Arrival(self.free, None)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            torch.cuda._sleep(int(seconds * self.cycles))
            _fill(receive, send)
            event = torch.cuda.Event()
            event.record()
        for buffer in (receive, send):
            buffer.record_stream(self.stream)
        return Arrival(0.0, event)


@dataclass(frozen=True)
class Arrival:
    """The handle of a collective, in flight until `wait`."""

    due: float
    event: Any  #: event of the stream that carries it, if there is one

    def wait(self) -> None:
        if self.event is not None:
            self.event.wait()
        else:
            time.sleep(max(0.0, self.due - time.perf_counter()))

    def is_completed(self) -> bool:
        return self.event.query() if self.event is not None else self.due < time.perf_counter()


def _fill(receive: Tensor, send: Tensor) -> None:
    """Copy as many bytes as would arrive: what is sent, then zeros."""
    size = min(receive.numel(), send.numel())
    receive[:size].copy_(send[:size])
    receive[size:].zero_()


def _cycles_per_second() -> float:
    cycles = 100_000_000
    torch.cuda._sleep(cycles)
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    torch.cuda._sleep(cycles)
    ended.record()
    ended.synchronize()
    return cycles / (began.elapsed_time(ended) / 1e3)


@dataclass
class Alone:
    """A board without other ranks."""

    rank: int
    world: int
    timeout: float = 600.0


class OneRank:
    """The program of one rank of a plan, run alone."""

    def __init__(self, plan: fxpass.Plan, rank: int, model: nn.Module, call: Call, compiled: bool) -> None:
        (self.device,) = {each.device for each in model.parameters()}
        self.board: Any = Alone(rank, plan.world_size)
        self.runner = StepRunner.of(plan, rank, self.open, self.device, Counter(), compile=compiled)
        self.weights = WeightTable(model, list(plan.program.weights.values())).tensors()
        self.call = call
        self.over(LINKS["nvlink"])

    def over(self, link: Link) -> None:
        """Use this link from now on."""
        self.runner.close()
        self.loopback = Loopback(self.device, link)
        self.step(EXACT)

    def open(self, specs: Sequence[ChannelSpec]) -> list[GroupChannel]:
        """Channels that all lead through the loopback."""
        return [GroupChannel(spec, self.loopback, self.device, False, self.board) for spec in specs]

    def step(self, step: Step) -> list[Tensor]:
        return self.runner.run(self.weights, self.call.tensors, step.context, self.runner.mode(step), step.pace)

    def without_exchanges(self) -> Callable[[], list[Tensor]]:
        """Steady steps without exchanges."""
        step = replace(DISPLACED, context=CEILING)
        return without_exchanges(self.runner, self.weights, lambda: self.call.tensors, step)


# -- measuring -----------------------------------------------------------------------------------------------------


def published(
    name: str, options: argparse.Namespace, dtype: torch.dtype | None, device: torch.device
) -> tuple[nn.Module, dict[str, Any]]:
    """A model of the catalog with random weights, and the inputs of one call."""
    torch.manual_seed(0)
    module, inputs = load(name, height=options.size, dtype=dtype, device=device, fake=False)
    return module.eval(), inputs


def seconds(step: Callable[[], Any], steps: int, device: torch.device) -> float:
    """The median time of `steps` steps."""
    taken = []
    for turn in range(WARM + steps):
        _settled(device)
        began = time.perf_counter()
        step()
        _settled(device)
        if turn >= WARM:
            taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def peak(step: Callable[[], Any], device: torch.device) -> int:
    """Bytes that a step allocates on top of what was allocated before."""
    if device.type != "cuda":
        return 0
    _settled(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    _settled(device)
    return torch.cuda.max_memory_allocated(device) - before


def _settled(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rms(found: Tensor, expected: Tensor) -> float:
    """Root-mean-square error, relative to the root mean square of the expected value."""
    found, expected = found.double(), expected.double()
    return ((found - expected).square().mean() / expected.square().mean()).sqrt().item()


@torch.no_grad()
def measure(name: str, options: argparse.Namespace) -> None:
    """Measure one model and print the results."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, inputs = published(name, options, DTYPES.get(options.dtype), device)
    call = Call.of(model, (), inputs)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(heading(name, model, f"{next(model.parameters()).dtype}, {where}, medians of {options.steps} steps"))

    run = lambda: output_tensors(model(**inputs))  # noqa: E731
    whole = seconds(run, options.steps, device)
    print(f"  whole model       {whole * 1e3:8.1f} ms   {peak(run, device) / 2**20:7.0f} MiB of activations")
    began = time.perf_counter()
    program = fxpass.capture(model, **inputs)
    print(f"  captured in       {time.perf_counter() - began:8.1f} s")
    work = flops(program.graph)
    print(f"  work              {work / 1e12:8.2f} TFLOP, {work / whole / 1e12:.0f} TFLOP/s")
    if options.exact:
        exact(name, program, model, inputs, run()[0], options, device)
    for world in options.ranks:
        began = time.perf_counter()
        plan = fxpass.plan(program, world_size=world, strategy=options.strategy)
        received = [sum(roles.values()) for roles in plan.bytes_received_per_rank]
        rank = max(range(world), key=lambda r: (plan.flops_per_rank[r], received[r]))
        print(f"  {world} ranks, rank {rank}: bound {plan.bound:.2f}, planned in {time.perf_counter() - began:.1f} s")
        for compiled in (False, True) if options.compile else (False,):
            projected(plan, rank, model, call, whole, compiled, options, device)
    if options.compile:
        alone(program, model, call, inputs, options.steps, device)


def exact(
    name: str,
    program: Program,
    model: nn.Module,
    inputs: dict[str, Any],
    unsplit: Tensor,
    options: argparse.Namespace,
    device: torch.device,
) -> None:
    """Compare all ranks in lockstep with the unsplit model in the same precision and in float32."""
    call = Call.of(model, (), inputs)
    full, _ = published(name, options, torch.float32, device)
    for theirs, ours in zip(full.parameters(), model.parameters(), strict=True):
        theirs.data.copy_(ours.data)
    given = pytree.tree_map_only(Tensor, lambda x: x.float() if x.is_floating_point() else x, inputs)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    reference = output_tensors(full(**given))[0]
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    del full
    print(f"  unsplit against float32: rms {rms(unsplit, reference):.2e}")
    for world in options.ranks:
        plan = fxpass.plan(program, world_size=world)
        weights = WeightTable(model, list(plan.program.weights.values())).tensors()
        found = LockstepExecutor(world).load(plan, weights, call.tensors).run_all(weights, call.tensors)
        same = all(torch.equal(each[0], found[0][0]) for each in found)
        print(
            f"  {world} ranks: rms {rms(found[0][0], unsplit):.2e} of the unsplit model, "
            f"{rms(found[0][0], reference):.2e} of float32; all ranks alike: {same}"
        )


def projected(
    plan: fxpass.Plan,
    rank: int,
    model: nn.Module,
    call: Call,
    whole: float,
    compiled: bool,
    options: argparse.Namespace,
    device: torch.device,
) -> None:
    one = OneRank(plan, rank, model, call, compiled)
    kind = "compiled" if compiled else "eager"
    for link in options.links:
        one.over(LINKS[link])
        steps = {"ceiling": one.without_exchanges()}
        steps |= {key: lambda s=s: one.step(s) for key, s in (("displaced", DISPLACED), ("sync", EXACT))}
        found = {key: seconds(step, options.steps, device) for key, step in steps.items()}
        text = "   ".join(f"{key} {value * 1e3:7.1f} ms ({whole / value:.2f}x)" for key, value in found.items())
        memory = peak(lambda: one.step(DISPLACED), device) / 2**20
        print(f"    {kind:<8} {link:<7} {text}   {memory:6.0f} MiB of activations", flush=True)


def alone(program: Any, model: nn.Module, call: Call, inputs: dict[str, Any], steps: int, device: torch.device) -> None:
    """Compare one compiled rank with `torch.compile` of the model."""
    one = OneRank(fxpass.plan(program, world_size=1), 0, model, call, True)
    ours = seconds(lambda: one.step(EXACT), steps, device)
    compiled = torch.compile(model)
    theirs = seconds(lambda: compiled(**inputs), steps, device)
    print(f"  compiled: fxpass with 1 rank {ours * 1e3:.1f} ms, torch.compile {theirs * 1e3:.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description="a rank's program on one GPU, with a modelled link")
    parser.add_argument("--models", nargs="+", default=["sdxl"], help="names of `fxpass models`")
    parser.add_argument("--dtype", choices=DTYPES, help="the precision that the model is usually run in by default")
    parser.add_argument("--size", type=int, help="pixels of a side; the model's usual size by default")
    parser.add_argument("--ranks", type=int, nargs="+", choices=range(2, 65), metavar="N", default=[2, 4, 8])
    parser.add_argument("--links", nargs="+", choices=LINKS, default=list(LINKS))
    parser.add_argument("--strategy", choices=STALE, default="displaced")
    parser.add_argument("--steps", type=int, default=10, help="timed; the median counts")
    parser.add_argument("--exact", action="store_true", help="also compare all ranks with the unsplit model")
    parser.add_argument("--compile", action="store_true", help="also compiled; takes minutes")
    options = parser.parse_args()
    for name in options.models:
        try:
            entry = get(name)
            entry.latent(options.size or entry.height, options.size or entry.width, entry.frames)
        except (LookupError, ValueError) as error:
            parser.error(str(error))
    for name in options.models:
        measure(name, options)


if __name__ == "__main__":
    main()
