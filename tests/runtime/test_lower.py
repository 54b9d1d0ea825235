"""compile=True: the same numbers, the schedule's order in the generated code, and a cache that a later process uses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import fxpass
from fxpass.capture import capture
from fxpass.ir import ops
from fxpass.ir.program import specialize
from fxpass.ir.strategy import Strategy
from fxpass.runtime.executor import Bound
from fxpass.runtime.interpreter import RankProgram, Site
from fxpass.runtime.lower import Compiled
from tests.runtime.plans import block, cut_plan, inputs

ROOT = Path(__file__).resolve().parents[2]


class Recorder:
    """Notes launches and waits, and answers with the values that an exact step has on one rank alone: noise."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.acts: list[tuple[str, int]] = []
        self.launched: dict[int, list[Any]] = {}

    def launch(self, site: Site, values: list[Any]) -> None:
        self.acts.append(("launch", site.index))
        self.launched[site.index] = [value.clone() for value in values]

    def wait(self, site: Site, values: list[Any]) -> list[Any]:
        self.acts.append(("wait", site.index))
        for now, then in zip(values, self.launched[site.index], strict=True):
            assert torch.equal(now, then), f"{site.name}: memory of a value under way was used for something else"
        generator = torch.Generator().manual_seed(site.index)
        shapes = [e.result_shape(self.rank, x.shape) for e, x in zip(site.exchanges, values, strict=True)]
        return [torch.rand(shape, generator=generator).to(x) + 0.5 for shape, x in zip(shapes, values, strict=True)]


@pytest.fixture(scope="module")
def lowered() -> dict[str, Any]:
    """Rank 1 of a small network: its program, what compiling it gave, and the generated code."""
    model = block()
    program = capture(model, *inputs())
    plan = cut_plan(program, 2, Strategy.of("displaced"))
    code = RankProgram.of(specialize(plan.graph, 1), 1)
    bound = Bound.of(code, plan.program, torch.device("cpu"))
    weights = [model.get_parameter(name).detach() for name in plan.program.weights.values()]
    values = bound.values(weights, [x for x in inputs() if isinstance(x, torch.Tensor)])
    compiled: list[Compiled] = []
    with torch.no_grad():
        _, sources = run_and_get_code(lambda: compiled.append(Compiled(code, False, values)))
    return {"code": code, "values": values, "compiled": compiled[0], "source": sources[-1], "graph": plan.graph}


def test_compiled_ranks_equal_interpreted_ranks(lowered: dict[str, Any]) -> None:
    """Also: what a wait is given is what was launched; Inductor has not used its memory in between (`Recorder`).

    (That what is under way is no memory of Inductor's, test_distributed.py shows by overwriting launched values.)
    """
    from fxpass.runtime.interpreter import drive

    plain, low = Recorder(1), Recorder(1)
    with torch.no_grad():
        expected = drive(lowered["code"].run(lowered["values"]), plain)
        found = lowered["compiled"].run(lowered["values"], low)
    assert low.acts == plain.acts  # the order of the schedule, the same on every rank
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_generated_code_launches_early_and_waits_late(lowered: dict[str, Any]) -> None:
    body = lowered["source"][lowered["source"].index("def call(") :].splitlines()
    kinds = {"launch": r"\w+ = torch\.ops\.fxpass\.launch", "wait": r"\w+ = torch\.ops\.fxpass\.wait"}
    kinds |= {"work": r"(\w+ = )?(extern_kernels\.\w+\(|cpp_fused\w*\(|torch\.ops\.aten\.\w+)"}
    order = [kind for line in body for kind, pattern in kinds.items() if re.match(pattern, line.strip())]
    scheduled = [n for n in lowered["graph"].nodes if n.target in (ops.exchange, ops.wait)]
    wanted = ["launch" if n.target is ops.exchange else "wait" for n in scheduled]
    assert [kind for kind in order if kind != "work"] == wanted
    nodes = list(lowered["graph"].nodes)
    overlapped = 0
    places = [i for i, kind in enumerate(order) if kind != "work"]
    for k, (node, at) in enumerate(zip(scheduled, places, strict=True)):
        if node.target is not ops.exchange:
            continue
        wait = next(i for i, n in enumerate(scheduled) if n.target is ops.wait and n.args[0] is node)
        between = nodes[nodes.index(node) + 1 : nodes.index(scheduled[wait])]
        work = [n for n in between if n.target in (torch.ops.aten.linear.default, torch.ops.aten.convolution.default)]
        if work:  # e.g. the queries, while keys and values are under way
            assert "work" in order[at : places[wait]], f"nothing is done while {node.name} is under way"
            overlapped += 1
        assert k < wait
    assert overlapped


PROGRAM = """
import json, sys, torch, fxpass
from tests.runtime.plans import block, steps
torch.set_num_threads(1)
model, off = block(), 0.0
options = {"strategy": sys.argv[1], "warmup_steps": 2}
compiled = fxpass.parallelize(model, 2, executor="spawn", compile=True, timeout=300, **options)
eager = fxpass.parallelize(model, 2, executor="lockstep", **options)
with compiled, torch.no_grad():
    for call in steps(5):
        a, b = compiled(*call)["sample"], eager(*call)["sample"]
        off = max(off, ((a - b).abs().max() / b.abs().max()).item())
    reports = [(r.displaced, r.seconds, r.cached) for r in compiled.compile_reports]
print(json.dumps({"off": off, "reports": reports}))
"""


def test_processes_are_compiled_and_a_second_start_finds_it_in_the_cache(tmp_path: Path) -> None:
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    runs = []
    for _ in range(2):
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM, "pcpp"],
            check=False, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        runs.append(json.loads(result.stdout.splitlines()[-1]))
    assert all(run["off"] <= 1e-5 for run in runs)
    assert [[cached for _, _, cached in run["reports"]] for run in runs] == [[False, False], [True, True]]
    assert [displaced for displaced, _, _ in runs[0]["reports"]] == [False, True]


def test_one_rank_is_compiled_and_several_in_lockstep_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot compile them"):
        fxpass.parallelize(block(), 2, executor="lockstep", compile=True)
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.SiLU()).eval()
    x = torch.randn(1, 4, 16, 8)
    module: Any = fxpass.parallelize(model, 1, compile=True)
    with torch.no_grad():
        torch.testing.assert_close(module(x), model(x))
    assert len(module.compile_reports) == 1


def test_a_compiled_program_follows_a_weight_of_other_strides() -> None:
    model: Any = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.SiLU()).eval()
    x = torch.randn(1, 16, 8)
    module: Any = fxpass.parallelize(model, 1, compile=True)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(module(x), model(x))
            model[0].weight.data = model[0].weight.data.t()
    assert len(module.compile_reports) == 2  # the third call has the strides of the first
