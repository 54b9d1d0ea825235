"""Stages on real processes: each has the weights of its stage, and all give what lockstep gives."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpass
from fxpass.ir.mesh import Mesh
from fxpass.ir.program import Program, is_on
from fxpass.ir.strategy import Strategy
from fxpass.make_plan import make_plan
from fxpass.plan import Plan
from fxpass.planning import Deal
from fxpass.runtime.calls.engine import Engine
from fxpass.runtime.calls.module import ParallelModule
from fxpass.runtime.errors import RankError
from fxpass.runtime.spawn import SpawnExecutor
from tests.runtime.patch_ranks import ROWS, equal, parallel
from tests.runtime.plans import block, inputs, steps, whole
from tests.runtime.stage_ranks import AT_ONCE, WAYS
from tests.torchrun import torchrun


@pytest.mark.parametrize(
    ("world", "options", "mesh"),
    [
        (2, {"stages": 2, "patches": 2}, Mesh(1, 2, 2)),
        (3, {"stages": 3}, Mesh(1, 1, 3)),
        (4, {"stages": 2, "cfg": 2}, Mesh(2, 1, 2)),
        (3, {"stages": 3, **AT_ONCE}, Mesh(1, 1, 3)),
    ],
)
def test_workers_with_stages_give_what_lockstep_gives_bit_for_bit(
    world: int, options: dict[str, Any], mesh: Mesh
) -> None:
    check(world, options, mesh)


def test_workers_that_are_connected_by_gloo_do_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage in the middle has no part in what the others send each other."""
    monkeypatch.setenv("FXPASS_SHM_DISABLE", "1")
    check(3, {"stages": 3, "patches": 2}, Mesh(1, 2, 3))
    check(3, {"stages": 3, "patches": 2, **AT_ONCE}, Mesh(1, 2, 3))


class Narrow(nn.Module):
    """Sends a value of three rows to the second stage."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(4, 8, 3, padding=1), nn.Conv1d(8, 4, 3, padding=1)
        self.narrow = nn.ModuleList(nn.Conv1d(8, 8, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Any:
        h = self.first(x)
        k = h[:, :, :3]
        for conv in self.narrow:
            k = conv(k).relu()
        return self.last(h).relu() + k.mean(-1, keepdim=True)[:, :4], k


@pytest.mark.parametrize("disable", ["0", "1"])
def test_a_patch_may_have_no_rows_of_what_a_stage_sends(disable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXPASS_SHM_DISABLE", disable)
    torch.manual_seed(0)
    model: Any = Narrow().eval()
    x = torch.randn(1, 4, 32)
    with torch.no_grad(), fxpass.parallelize(model, 2, stages=2, patches=4, executor="spawn", timeout=60) as module:
        torch.testing.assert_close(module(x), model(x))
        sent = [each.declared for each in module.plan.exchanges if each.role == "transfer"]
        assert any(0 in [each.numel(patch, 4 + patch) for patch in range(4)] for each in sent)


def check(world: int, options: dict[str, Any], mesh: Mesh) -> None:
    with parallel(world, executor="spawn", timeout=30, **options) as module:
        assert equal(module, parallel(world, executor="lockstep", **options))
        torch.testing.assert_close(module(*inputs(ROWS))["sample"], whole(block(), *inputs(ROWS)))
        assert module.plan.mesh == mesh


@pytest.mark.parametrize(("transport", "kind"), [("memory", "MemoryChannel"), ("gloo", "GroupChannel")])
def test_stages_under_torchrun_give_what_lockstep_gives_bit_for_bit(transport: str, kind: str, tmp_path: Path) -> None:
    for found in torchrun("tests.runtime.stage_ranks", folder=tmp_path, transport=transport):
        assert found.pop("kinds") == [kind]
        assert found == dict.fromkeys(WAYS, True)


def _staged(executor: SpawnExecutor) -> Any:
    def planner(program: Program) -> Plan:
        world = executor.world_size
        return make_plan(program, world, Strategy(), "cpu", deal=Deal.of(world, 1, None, None, world))

    model = block()
    return ParallelModule(model, Engine(model, planner, executor))


@pytest.mark.parametrize("copies", [False, True])
def test_a_worker_gets_the_weights_of_its_stage_alone_and_what_changes_of_them(copies: bool) -> None:
    executor = SpawnExecutor(3, timeout=30, copies=copies)
    with _staged(executor) as module:
        call = inputs(ROWS)
        torch.testing.assert_close(module(*call)["sample"], whole(block(), *call))
        nodes = {node.name: node for node in module.plan.graph.nodes if node.op == "placeholder"}
        readers = {
            name: {rank for rank in (1, 2) if is_on(nodes[each], rank)}
            for each, name in module.plan.program.weights.items()
        }
        assert set() in readers.values()
        assert {1, 2} not in readers.values()
        assert executor._weights is not None
        assert executor._weights._holders == {name: some for name, some in readers.items() if some or not copies}
        model = module.unwrapped
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.5)
        torch.testing.assert_close(module(*call)["sample"], whole(model, *call))
        model.conv_out.weight = torch.nn.Parameter(torch.randn_like(model.conv_out.weight))
        torch.testing.assert_close(module(*call)["sample"], whole(model, *call))
        other = inputs(ROWS - 8)  # another plan, whose stages may need other weights
        torch.testing.assert_close(module(*other)["sample"], whole(model, *other))


@pytest.mark.parametrize("options", [{}, AT_ONCE])
def test_a_killed_stage_is_an_error_on_the_others_within_the_timeout(options: dict[str, Any]) -> None:
    with parallel(2, executor="spawn", timeout=30, stages=2, **options) as module:
        calls = steps(9, rows=ROWS)
        module(*calls[0])
        (process,) = module._engine.executor.processes
        threading.Timer(0.2, process.send_signal, [signal.SIGKILL]).start()
        began = time.monotonic()

        def go_on() -> None:
            while time.monotonic() < began + 60:
                for call in calls:
                    module(*call)

        with pytest.raises(RankError, match="was killed by SIGKILL"):
            go_on()
        assert time.monotonic() - began < 30


@pytest.mark.slow
def test_compiled_stages_give_what_the_whole_model_gives() -> None:
    module: Any = fxpass.parallelize(block(), 2, executor="lockstep", stages=2, compile="inductor")
    torch.testing.assert_close(module(*inputs(ROWS))["sample"], whole(block(), *inputs(ROWS)))
