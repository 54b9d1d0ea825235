"""Measure how evenly plans divide the work of real models, compared with what is possible; writes docs/balance.md.

    python -m fxpass.tools.sweeps.balance [--ranks 2 4 8] [--write] [NAME …]

Every model of the catalog at its usual size, without weights, each in a process of its own. The *bound* is the
speed-up that the slowest rank's work allows. The *ideal* is what divisibility and unavoidable replication allow:

    total / (replicated + shared)
    replicated = work that depends on no input with rows to cut (timesteps, pooled text)
    shared     = for every other operator, its work × ⌈N / n⌉ / N

where N is the size of the dim of the operator's result along which n ranks divide it most evenly (law 1: one dim is
split; channels and the last dim of products do not count). This bounds each operator separately: cuts that suit all of
them at once may not exist. *Overhead* is the share of bytes of an exact step in exchanges that only move cuts (realign,
rebalance), replicate (small) or gather what no rule splits (fallback). Seconds are CPU time of one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

import torch

from ...ir.program import calls, shape_of
from ...make_plan import plan
from ...models.catalog import catalog, load
from ...passes.cost import node_flops
from ...passes.cuts import OVERHEAD, inputs_with_rows
from ...plan import Plan
from ..checkout import ROOT

RANKS = (2, 4, 8)


@dataclass(frozen=True)
class Balance:
    """The measurements of one plan; seconds are CPU time of this process."""

    name: str
    ranks: int
    bound: float
    ideal: float
    overhead: float
    fallbacks: int
    attempts: int
    capture: float
    plan: float
    memory: int  #: bytes at the peak of the process
    fingerprint: str

    @property
    def good(self) -> bool:
        """Whether the aim is met: nearly n times as fast, or nearly the ideal; little overhead; a plan in seconds."""
        even = self.bound >= 15 / 16 * self.ranks or self.bound >= 0.98 * self.ideal
        return even and self.overhead < 0.01 and not self.fallbacks and self.capture + self.plan <= 20


def ideal(made: Plan) -> float:
    """The speed-up that divisibility and unavoidable replication allow (see the module's docstring)."""
    world = made.world_size
    inputs = inputs_with_rows(made.program.graph, made.program.inputs)
    reached = {node for node in inputs if max(shape_of(node)[1:]) >= world}
    slowest = 0.0
    for node in calls(made.program.graph):
        work = node_flops(node)
        if reached.isdisjoint(node.all_input_nodes):
            slowest += work
            continue
        reached.add(node)
        if work:
            first = 2 if node.target is torch.ops.aten.convolution.default else 0
            sizes = shape_of(node)[first:] if first else shape_of(node)[:-1]
            slowest += work * min((-(-size // world) / size for size in sizes), default=1.0)
    return made.flops_total / slowest


def measure(name: str, ranks: tuple[int, ...] = RANKS) -> list[Balance]:
    """Plan one catalog entry at its usual size."""
    from ...capture import capture

    module, kwargs = load(name)
    started = time.process_time()
    program = capture(module, **kwargs)
    captured = time.process_time() - started
    found = []
    for n in ranks:
        started = time.process_time()
        made = plan(program, world_size=n)
        planned = time.process_time() - started
        sizes = made.bytes_by_role
        overhead = sum(sizes.get(role, 0) for role in OVERHEAD) / max(1, sum(sizes.values()))
        found.append(
            Balance(
                name, n, made.bound, ideal(made), overhead, len(made.fallbacks), made.attempts, captured, planned,
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, made.fingerprint,
            )
        )  # fmt: skip
    return found


def table(found: list[Balance]) -> list[str]:
    """Rows of Markdown."""
    lines = [
        "| model | ranks | bound | ideal | overhead | fallbacks | attempts | capture, s | plan, s | |",
        "|" + " --- |" * 10,
    ]
    for each in found:
        cells = [
            each.name, str(each.ranks), f"{each.bound:.2f}", f"{each.ideal:.2f}", f"{each.overhead:.2%}",
            str(each.fallbacks), str(each.attempts), f"{each.capture:.1f}", f"{each.plan:.1f}",
            "" if each.good else "under the aim",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def measured(name: str, ranks: tuple[int, ...], **environment: str) -> list[Balance]:
    """Run `measure` in a process of its own, with additional environment variables.

    Raises `RuntimeError` with the last line of its error if it fails.
    """
    command = [sys.executable, "-m", "fxpass.tools.sweeps.balance", name, "--json", "--ranks", *map(str, ranks)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    if run.returncode:
        raise RuntimeError(f"{name}: {(run.stderr.strip().splitlines() or ['no message'])[-1]}")
    return [Balance(**each) for each in json.loads(run.stdout.splitlines()[-1])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="catalog entries; all by default")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--json", action="store_true", help="measure in this process and print plain data")
    parser.add_argument("--write", action="store_true", help="write docs/balance.md")
    options = parser.parse_args()
    if options.json:
        torch.set_num_threads(1)
        print(json.dumps([asdict(each) for name in options.names for each in measure(name, tuple(options.ranks))]))
        return
    found: list[Balance] = []
    failed: list[str] = []
    for name in options.names or catalog:
        try:
            rows = measured(name, tuple(options.ranks))
        except RuntimeError as error:
            failed.append(str(error))
            print(error, flush=True)
            continue
        print("\n".join(table(rows)[2:]), flush=True)
        found += rows
    if options.write:
        parts = [
            "# Balance",
            f"    python -m fxpass.tools.sweeps.balance {' '.join(sys.argv[1:])}",
            *_explained(),
            "\n".join(table(found)),
        ]
        parts += ["## Not planned", "\n".join(f"- {each}" for each in failed)] if failed else []
        (ROOT / "docs" / "balance.md").write_text("\n\n".join(parts) + "\n")


def _explained() -> list[str]:
    assert __doc__ is not None
    return __doc__.strip().split("\n\n")[2:]


if __name__ == "__main__":
    main()
