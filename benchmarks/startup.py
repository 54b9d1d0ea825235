"""`make bench-startup`: how long worker processes take to start with a large model, and the memory that all hold.

    python -m benchmarks.startup [--gigabytes 1] [--ranks 2]

The model is a chain of linear layers, which computes little. Each run is a process of its own: it loads the weights
from a file and makes two calls. `unsplit` is the model alone, `spawn` the same after `fxpass.parallelize` with worker
processes. Memory is the sum of the processes' proportional shares (pages that two processes map count half in each).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 2048
AIM = 5.0  #: seconds beyond the plain load


class Chain(nn.Module):
    """Linear layers on the rows of a picture."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        for layer in self.layers:
            sample = sample + layer(sample).sin() * timestep
        return sample


def main() -> None:
    parser = argparse.ArgumentParser(description="start-up of worker processes with a large model")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", nargs=2, metavar=("FILE", "KIND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    layers = round(options.gigabytes * 1e9 / (4 * WIDTH * (WIDTH + 1)))
    if options.run:
        print(json.dumps(run(Path(options.run[0]), options.run[1], layers, options.ranks)))
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "weights.pt")
        torch.save(Chain(layers).state_dict(), file)
        found: dict[str, list[dict[str, float]]] = {"unsplit": [], "spawn": []}
        for _ in range(options.rounds):
            for kind, measured in found.items():
                command = [sys.executable, "-m", "benchmarks.startup", *sys.argv[1:], "--run", str(file), kind]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                measured.append(json.loads(done.stdout.splitlines()[-1]))
        size = file.stat().st_size
    print(f"{size / 1e9:.2f} GB of weights, {options.ranks} ranks, medians of {options.rounds} runs")
    middle = {
        kind: {name: statistics.median(each[name] for each in measured) for name in measured[0]}
        for kind, measured in found.items()
    }
    for kind, each in middle.items():
        print(f"  {kind:<8} loaded in {each['load']:.1f} s, calls {each['first']:.1f} s and {each['second']:.2f} s")
    beyond = middle["spawn"]["first"] - middle["unsplit"]["first"]
    print(f"  beyond the plain load and call: {beyond:.1f} s   aim: at most {AIM:g}")
    more = (middle["spawn"]["memory"] - middle["unsplit"]["memory"]) / size
    print(f"  memory beyond that of the unsplit process: {more:.2f} times the weights")


@torch.no_grad()
def run(file: Path, kind: str, layers: int, ranks: int) -> dict[str, float]:
    """Load the model and call it twice; returns seconds and bytes."""
    import fxpass

    torch.set_num_threads(1)
    began = time.perf_counter()
    with torch.device("meta"):
        model: Any = Chain(layers)
    model.load_state_dict(torch.load(file), assign=True)
    model.eval()
    times = {"load": time.perf_counter() - began}
    if kind == "spawn":
        model = fxpass.parallelize(model, ranks, executor="spawn")
    for name in ("first", "second"):
        began = time.perf_counter()
        model(torch.randn(1, 16, WIDTH), torch.tensor(0.1))
        times[name] = time.perf_counter() - began
    times["memory"] = float(sum(proportional(each) for each in processes()))
    if kind == "spawn":
        model.close()
    return times


def processes() -> list[str]:
    """This process and all that it has started."""
    found = ["self"]
    for path in Path("/proc/self/task").glob("*/children"):
        found += path.read_text().split()
    return found


def proportional(process: str) -> int:
    """Bytes of memory of a process, with its share of what several processes map."""
    lines = Path("/proc", process, "smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


if __name__ == "__main__":
    main()
