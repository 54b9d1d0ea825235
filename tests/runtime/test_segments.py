"""compile=True: the same numbers, equal segments compiled once, and a cache that a later process uses."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpass
from fxpass.capture import capture
from fxpass.ir.step import EXACT
from fxpass.ir.strategy import Strategy
from fxpass.passes.codegen import step_code
from fxpass.passes.lower_comm import StepPrograms
from fxpass.runtime.lockstep import LockstepExecutor
from tests import forks
from tests.runtime.plans import broken_on_rank_1, cut_plan, inputs, parallel, steps

ROOT = Path(__file__).resolve().parents[2]


class Small(nn.Module):
    """Every kind of exchange, in few segments: each takes a second or two to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.qkv = nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.Linear(8, 24)

    def forward(self, sample: Tensor, timestep: Tensor) -> Any:
        h = self.norm(self.conv(sample) + timestep.view(-1, 1, 1, 1))
        q, k, v = self.qkv(h.flatten(2).transpose(1, 2)).chunk(3, -1)
        return {"sample": nn.functional.scaled_dot_product_attention(q, k, v)}


def test_compiled_segments_equal_interpreted_ones_at_exact_and_displaced_steps() -> None:
    model = Small().eval()
    strategy = replace(Strategy.of("displaced"), warmup_steps=2)
    compiled, eager = (parallel(model, LockstepExecutor(2, compile=c), strategy) for c in (True, False))
    for call in steps(5):
        torch.testing.assert_close(compiled(*call)["sample"], eager(*call)["sample"], rtol=1e-5, atol=1e-5)


def test_blocks_that_repeat_share_their_segments() -> None:
    counts = []
    for depth in (2, 4):
        model = nn.Sequential(*(Layer() for _ in range(depth))).eval()
        plan = cut_plan(capture(model, torch.randn(1, 32, 8)), 2)
        code = step_code(StepPrograms(plan.graph, 0)["exact"], segmented=True)
        calls = code.source.count("compiled[")
        counts.append((calls, len(code.segments)))
    (few, distinct), (many, same) = counts
    assert many > few
    assert same == distinct
    operators = "".join(segment.source for segment in code.segments.values()).count("= c")
    assert operators > 3 * len(code.segments)  # views alone are not compiled


class Layer(nn.Module):
    """A block of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(8), nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + nn.functional.scaled_dot_product_attention(q, k, v)


def test_an_error_in_a_segment_names_its_nodes() -> None:
    model = Small().eval()
    plan = broken_on_rank_1(cut_plan(capture(model, *inputs()), 2))
    weights = [model.get_parameter(name).detach() for name in plan.program.weights.values()]
    loaded = LockstepExecutor(2, compile=True).load(plan, weights, inputs())
    with torch.no_grad(), pytest.raises(Exception) as error:  # noqa: PT011
        loaded.run(weights, inputs(), EXACT)
    assert any("rank 1" in note and "reshape" in note for note in error.value.__notes__)


PROGRAM = """
import json, sys, torch, fxpass
torch.set_num_threads(1)
torch.manual_seed(0)
number = float(sys.argv[1])

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = (torch.nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))

    def forward(self, x):
        return self.last((self.first(x) * number).sin())

model = Model().eval()
x = torch.randn(1, 4, 16, 8)
with fxpass.parallelize(model, 2, executor="spawn", compile=True, timeout=300) as compiled, torch.no_grad():
    off = max((compiled(x) - model(x)).abs().max().item() for _ in range(2))
    reports = [(r.segments, r.seconds, r.cached) for r in compiled.compile_reports]
print(json.dumps({"off": off, "reports": reports}))
"""


def test_processes_are_compiled_and_a_second_start_finds_it_in_the_cache() -> None:
    number = str(1 + time.time_ns() % 10**9 / 10**9)  # in the code that is compiled: no earlier test run has made it
    runs = []
    for _ in range(2):
        result = forks.run([sys.executable, "-c", PROGRAM, number], env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert result.returncode == 0, result.stderr
        runs.append(json.loads(result.stdout.splitlines()[-1]))
    assert all(run["off"] <= 1e-5 for run in runs)
    assert [[cached for _, _, cached in run["reports"]] for run in runs] == [[False], [True]]
    assert {segments for run in runs for segments, _, _ in run["reports"]} == {3}


def test_one_rank_is_one_segment() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.SiLU()).eval()
    x = torch.randn(1, 4, 16, 8)
    module: Any = fxpass.parallelize(model, 1, compile=True)
    with torch.no_grad():
        torch.testing.assert_close(module(x), model(x))
    assert [report.segments for report in module.compile_reports] == [1]


def test_a_compiled_program_follows_a_weight_of_other_strides() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.SiLU()).eval()
    x = torch.randn(1, 16, 8)
    module: Any = fxpass.parallelize(model, 1, compile=True)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(module(x), model(x))
            model[0].weight.data = model[0].weight.data.t()
    assert [report.segments for report in module.compile_reports] == [2]  # the third call has the strides of the first


def test_processes_compile_all_segments_before_the_first_step() -> None:
    """In a process of its own, for its threads. Each segment has a number that no earlier run has compiled."""
    script = """
import time, torch
from fxpass.capture import capture
from fxpass.ir.step import EXACT
from fxpass.ir.code import Segment
from fxpass.runtime import precompile, step_runner
from fxpass.runtime.lockstep import LockstepExecutor
from fxpass.runtime.segments import Compiler, missed
from tests.runtime.plans import cut_plan
from tests.runtime.test_segments import Layer

torch.set_num_threads(2)
torch.use_deterministic_algorithms(True)
step_runner.new_compiler = lambda rank, sharing: Compiler(rank, processes=2)
jobs, nobody_else = precompile.jobs, lambda: 0  # what cannot be sent is left to this process
precompile.jobs = lambda *given: [*jobs(*given), (Segment("def segment(inputs):", (nobody_else,)), ())]
number = 1 + time.time_ns() % 10**9 / 10**9

class Unique(Layer):
    def forward(self, x):
        return super().forward(x * number) * number

model, x = Unique().eval(), torch.randn(1, 32, 8)
plan = cut_plan(capture(model, x), 2)
weights = [model.get_parameter(name) for name in plan.program.weights.values()]
with torch.no_grad():
    loaded = LockstepExecutor(2, compile=True).load(plan, weights, [x])
    found = loaded.run_all(weights, [x], EXACT)[0][0]
    reports = [(report.segments > 0, report.cached) for report in loaded.compiled]
    print(missed(), reports, torch.allclose(found, model(x), atol=1e-5))
"""
    run = forks.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.splitlines()[-1].startswith("0 [(True, False)")
    assert run.stdout.endswith("True\n")
