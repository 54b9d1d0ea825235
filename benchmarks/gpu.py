"""Project from one GPU to several: time one rank's steps while its messages go over a modelled link.

    python -m benchmarks.gpu [--models sdxl flux-dev] [--size 2048] [--ranks 8] [--links nvlink] [--whole eager]

A published model at its usual size, with random weights, runs whole in every way that torch has; the fastest is what
counts. Then the slowest rank's steps of an n-rank plan run alone (`benchmarks/loopback.py`), eagerly, compiled by
Inductor, and recorded as CUDA graphs:

    steady     displaced steps of the strategy
    exact      exact steps
    ceiling    the displaced program without exchanges: the same operators, on messages that stay the same

Not included are late ranks and several GPUs' real links: these are projections. Every result is written at once to
out/gpu/, so that an interrupted run goes on; --again measures anew. Compiling takes most of the time: the defaults are
what one model needs to be compared. With --exact all ranks run in lockstep and are compared with the unsplit model. On
CPUs graphs and torch.compile are left out, and the numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree

import fxpass
from benchmarks.displaced import STALE
from benchmarks.harness import DISPLACED
from benchmarks.loopback import LINKS, OneRank, graphed
from fxpass.capture import Call
from fxpass.capture.structure import WeightTable
from fxpass.ir.program import Program
from fxpass.ir.step import EXACT, Step
from fxpass.models.catalog import get, load
from fxpass.models.small import output_tensors
from fxpass.passes.cost import flops
from fxpass.runtime.lockstep import LockstepExecutor

ROOT = Path(__file__).resolve().parent.parent
WARM = 4  #: untimed steps: each mode runs once unrecorded, and is recorded for both parities
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
WAYS = {"eager": (False, False), "inductor": (True, False), "graph": (False, True), "inductor+graph": (True, True)}


WHOLE = "eager", "graph", "torch.compile", "channels_last"


class Results:
    """Numbers by name, kept in a file."""

    def __init__(self, path: Path, again: bool) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() and not again else {}

    def measure(self, name: str, run: Callable[[], dict[str, Any]]) -> None:
        """Measure a row unless it is there."""
        if name not in self.rows:
            self.rows[name] = run()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.rows, indent=1))
        print(f"  {name:<34} {self.text(self.rows[name])}", flush=True)

    @property
    def whole(self) -> float:
        """Milliseconds of the fastest whole model."""
        return min((row["ms"] for name, row in self.rows.items() if name.startswith("whole")), default=0.0)

    def text(self, row: dict[str, Any]) -> str:
        """A row for people; a rank's steady step beside the fastest whole model."""
        ahead = [f"{self.whole / row['steady']:.2f}x of the fastest whole model"] if row.get("steady") else []
        return "  ".join([f"{key} {value:.4g}" for key, value in row.items() if value is not None] + ahead)

    def markdown(self) -> str:
        columns = list(dict.fromkeys(key for row in self.rows.values() for key in row))
        lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
        for name, row in self.rows.items():
            cells = ("" if row.get(column) is None else f"{row[column]:.4g}" for column in columns)
            lines.append(f"| {name} | {' | '.join(cells)} |")
        return "\n".join(lines)


def published(
    name: str, options: argparse.Namespace, dtype: torch.dtype | None, device: torch.device
) -> tuple[nn.Module, dict[str, Any]]:
    """A model of the catalog with random weights, and the inputs of one call."""
    torch.manual_seed(0)
    module, inputs = load(name, height=options.size, dtype=dtype, device=device, fake=False)
    return module.eval(), inputs


def milliseconds(step: Callable[[], Any], steps: int, device: torch.device) -> float:
    """The median time of `steps` steps."""
    taken = []
    for turn in range(WARM + steps):
        _settled(device)
        began = time.perf_counter()
        step()
        _settled(device)
        if turn >= WARM:
            taken.append(time.perf_counter() - began)
    return statistics.median(taken) * 1e3


def kernels(step: Callable[[], Any], device: torch.device) -> int | None:
    """How many kernels a step launches; None on CPUs."""
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        _settled(device)
    return sum(event.count for event in seen.key_averages())


def _settled(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rms(found: Tensor, expected: Tensor) -> float:
    """Root-mean-square error, relative to the root mean square of the expected value."""
    found, expected = found.double(), expected.double()
    return ((found - expected).square().mean() / expected.square().mean()).sqrt().item()


@torch.no_grad()
def measure(name: str, options: argparse.Namespace) -> None:
    """Measure one model, and print and write the results."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, inputs = published(name, options, DTYPES.get(options.dtype), device)
    call = Call.of(model, (), inputs)
    size = options.size or get(name).height
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    dtype = next(model.parameters()).dtype
    kind = f"{name}-{size}-{options.strategy}-{str(dtype).removeprefix('torch.')}-{where.replace(' ', '-')}"
    results = Results(options.out / f"{kind}.json", options.again)
    print(f"{name} at {size}, {dtype}, torch {torch.__version__}, {where}, medians of {options.steps} steps")
    expected = output_tensors(model(**inputs))[0].clone()
    whole_model(results, model, inputs, options, device)
    program = fxpass.capture(model, **inputs)
    if options.exact:
        exact(name, program, model, inputs, expected, options, device)
    meshes = [(world, groups) for world in options.ranks for groups in options.cfg if world % groups == 0]
    for world, groups in meshes:
        if get(name).batch % groups:  # its calls cannot be divided
            continue
        strategy = options.strategy if world > 1 else "sync"
        plan = fxpass.plan(program, world_size=world, strategy=strategy, cfg=groups)
        received = [sum(roles.values()) for roles in plan.bytes_received_per_rank]
        rank = max(range(world), key=lambda r, p=plan, b=received: (p.flops_per_rank[r], b[r]))
        print(f"  {mesh(plan)}, rank {rank}: bound {plan.bound:.2f}, {flops(program.graph) / 1e12:.2f} TFLOP in all")
        for way in options.ways if device.type == "cuda" else ("eager",):
            one_rank(results, plan, rank, model, call, way, options, device)
    (options.out / f"{kind}.md").write_text(results.markdown() + "\n")


def whole_model(
    results: Results, model: nn.Module, inputs: dict[str, Any], options: argparse.Namespace, device: torch.device
) -> None:
    """The unsplit model: eager, as a graph, compiled, and compiled with channels_last where it has convolutions."""
    steps, wanted = options.steps, options.whole if device.type == "cuda" else ("eager",)

    def timed(run: Callable[[], Any]) -> dict[str, Any]:
        began = time.perf_counter()
        run()
        _settled(device)
        first = time.perf_counter() - began
        return {"ms": milliseconds(run, steps, device), "first call s": first, "kernels": kernels(run, device)}

    if "eager" in wanted:
        results.measure("whole, eager", lambda: timed(lambda: model(**inputs)))
    if "graph" in wanted:
        results.measure("whole, graph", lambda: timed(graphed(lambda: model(**inputs), device)))
    if "torch.compile" in wanted:
        plain = torch.compile(model, dynamic=False)
        results.measure("whole, torch.compile", lambda: timed(lambda: plain(**inputs)))
    if "channels_last" in wanted and any(isinstance(module, nn.Conv2d) for module in model.modules()):

        def channels_last() -> dict[str, Any]:
            anything: Any = model  # the stubs of torch do not know this argument alone
            anything.to(memory_format=torch.channels_last)
            compiled = torch.compile(model, dynamic=False)
            row = timed(lambda: compiled(**inputs))
            row["graph ms"] = milliseconds(graphed(lambda: compiled(**inputs), device), steps, device)
            anything.to(memory_format=torch.contiguous_format)
            return row

        results.measure("whole, torch.compile, channels_last", channels_last)


def one_rank(
    results: Results,
    plan: fxpass.Plan,
    rank: int,
    model: nn.Module,
    call: Call,
    way: str,
    options: argparse.Namespace,
    device: torch.device,
) -> None:
    """The steps of one rank, compiled in one way."""
    inductor, graph = WAYS[way]

    def timed(one: OneRank, step: Step) -> float:
        return milliseconds(lambda: one.step(step), options.steps, device)

    for link in options.links if plan.world_size > 1 else ("no link",):

        def row(link: str = link) -> dict[str, Any]:
            began = time.perf_counter()
            one = OneRank(plan, rank, model, call, LINKS.get(link), inductor=inductor, graph=graph)
            found: dict[str, Any] = {"exact": timed(one, EXACT)}
            if plan.world_size > 1:
                found["steady"] = timed(one, DISPLACED)
                silent = OneRank(plan, rank, model, call, None, inductor=inductor, graph=graph)
                for _ in range(2):  # after two exact steps a displaced one has a pace
                    silent.step(EXACT)
                found["ceiling"] = timed(silent, DISPLACED)
                found["kernels"] = kernels(lambda: one.step(DISPLACED), device)
                found["ceiling's kernels"] = kernels(lambda: silent.step(DISPLACED), device)
            found["segments"] = sum(report.segments for report in one.runner.reports) or None
            found["compile s"] = sum(report.seconds for report in one.runner.reports) or None
            found["state GB"] = max(plan.state_bytes_per_rank) / 1e9
            found["all s"] = time.perf_counter() - began
            return found

        results.measure(f"{mesh(plan)}, {link}, {way}", row)


def mesh(plan: fxpass.Plan) -> str:
    """The ranks of a plan: `8 ranks`, or `2 x 4 ranks` for two groups of four."""
    groups = plan.mesh.groups
    return f"{groups} x {plan.world_size // groups} ranks" if groups > 1 else f"{plan.world_size} ranks"


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
    for world in (each for each in options.ranks if each > 1):
        plan = fxpass.plan(program, world_size=world)
        weights = WeightTable(model, list(plan.program.weights.values())).tensors()
        found = LockstepExecutor(world).load(plan, weights, call.tensors).run_all(weights, call.tensors)
        same = all(torch.equal(each[0], found[0][0]) for each in found)
        print(
            f"  {world} ranks: rms {rms(found[0][0], unsplit):.2e} of the unsplit model, "
            f"{rms(found[0][0], reference):.2e} of float32; all ranks alike: {same}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="a rank's program on one GPU, with a modelled link")
    parser.add_argument("--models", nargs="+", default=["sdxl"], help="names of `fxpass models`")
    parser.add_argument("--dtype", choices=DTYPES, help="the precision that the model is usually run in by default")
    parser.add_argument("--size", type=int, help="pixels of a side; the model's usual size by default")
    parser.add_argument("--ranks", type=int, nargs="+", choices=range(1, 65), metavar="N", default=[8])
    parser.add_argument("--cfg", type=int, nargs="+", choices=(1, 2), default=[1], help="groups for guidance branches")
    parser.add_argument("--links", nargs="+", choices=LINKS, default=["nvlink"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["inductor+graph"])
    parser.add_argument("--whole", nargs="*", choices=WHOLE, default=["eager", "torch.compile"])
    parser.add_argument("--strategy", choices=STALE, default="displaced")
    parser.add_argument("--steps", type=int, default=10, help="timed; the median counts")
    parser.add_argument("--exact", action="store_true", help="also compare all ranks with the unsplit model")
    parser.add_argument("--again", action="store_true", help="measure also what has been measured")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu", help="the folder of the results")
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
