"""More patches than processes: a process runs several ranks in turn, and gives what as many processes would give."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import fxpass
from fxpass.ir.mesh import Mesh, Placement
from fxpass.runtime.errors import RankError
from tests.runtime.patch_ranks import ROWS, STRATEGIES, equal, named, parallel
from tests.runtime.plans import block, inputs, steps, whole
from tests.torchrun import torchrun


def lockstep(world: int, **options: Any) -> Any:
    return parallel(world, executor="lockstep", **options)


def spawn(world: int, **options: Any) -> Any:
    return parallel(world, executor="spawn", timeout=30, **options)


def test_processes_run_ranks_that_follow_each_other() -> None:
    placement = Placement((2, 1, 3))
    assert (placement.processes, placement.world, placement.several) == (3, 6, True)
    assert list(placement) == [range(2), range(2, 3), range(3, 6)]
    assert [placement.process(rank) for rank in range(6)] == [0, 0, 1, 2, 2, 2]
    assert not Placement.one_each(3).several


def test_one_process_runs_all_patches_exactly() -> None:
    module: Any = fxpass.parallelize(block(), 1, patches=4)
    torch.testing.assert_close(module(*inputs(ROWS))["sample"], whole(block(), *inputs(ROWS)))
    assert module.plan.placement == Placement((4,))
    assert "4 ranks on 1 process" in str(module.plan)
    assert equal(module, lockstep(4))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_workers_with_several_patches_give_what_lockstep_gives_bit_for_bit(strategy: str) -> None:
    with spawn(2, patches=8, **named(strategy)) as module:
        assert equal(module, lockstep(8, **named(strategy)))
        torch.testing.assert_close(module(*inputs(ROWS))["sample"], whole(block(), *inputs(ROWS)))
        plan = module.plan
    assert (plan.mesh, plan.placement) == (Mesh(1, 8), Placement((4, 4)))


def test_only_what_other_processes_send_is_traffic() -> None:
    with spawn(2, patches=4) as module:
        module(*inputs(ROWS))
        received: Counter[str] = Counter()
        for each in module.plan.exchanges:
            declared, size = each.declared, each.declared.dtype.itemsize
            readers = (0,) if declared.broadcast else (0, 1)
            received[each.role] += size * sum(declared.numel(src, dst) for src in (2, 3) for dst in readers)
        assert module.traffic == {role: count for role, count in received.items() if count}
        assert sum(received.values()) < sum(
            map(sum, (rank.values() for rank in module.plan.bytes_received_per_rank[:2]))
        )


def test_processes_under_torchrun_give_what_lockstep_gives_bit_for_bit(tmp_path: Path) -> None:
    """Through shared memory and, without it, through gloo."""
    for process in torchrun("tests.runtime.patch_ranks", folder=tmp_path):
        for kind, found in zip(("MemoryChannel", "GroupChannel"), process, strict=True):
            assert found.pop("kinds") == [kind]
            assert found == dict.fromkeys([*STRATEGIES, "groups"], True)


def test_a_killed_process_is_an_error_within_the_timeout() -> None:
    with spawn(2, patches=4, **named("displaced")) as module:
        calls = steps(5, rows=ROWS)
        for call in calls[:3]:
            module(*call)
        (process,) = module._engine.executor.processes
        threading.Timer(0.2, process.send_signal, [signal.SIGKILL]).start()
        began = time.monotonic()

        def go_on() -> None:
            while time.monotonic() < began + 60:
                module(*calls[3])

        with pytest.raises(RankError, match="was killed by SIGKILL"):
            go_on()
        assert time.monotonic() - began < 30


def test_an_interrupted_generation_leaves_nothing_in_flight() -> None:
    with spawn(2, patches=4, **named("displaced")) as module:
        expected = lockstep(4, **named("displaced"))
        for call in steps(4, rows=ROWS):  # the last step is displaced, and its messages are never read
            module(*call)
        assert equal(module, expected)
        module.reset()
        assert equal(module, expected)


def test_patches_are_those_of_each_group() -> None:
    module = lockstep(2, cfg=2, patches=2)
    sample, timestep = inputs(ROWS)
    torch.testing.assert_close(module(sample, timestep)["sample"], whole(block(), sample, timestep))
    assert (module.plan.mesh, module.plan.placement) == (Mesh(2, 2), Placement((2, 2)))
    assert "4 ranks on 2 processes (2 groups of 2 patches)" in str(module.plan)


def test_the_ranks_agree_on_how_patches_are_dealt() -> None:
    plans = [fxpass.plan(block(), *inputs(ROWS), world_size=world, patches=4) for world in (1, 2, 4)]
    assert len({plan.fingerprint for plan in plans}) == 3
    assert plans[2].fingerprint == fxpass.plan(block(), *inputs(ROWS), world_size=4).fingerprint


def test_a_saved_plan_has_its_patches(tmp_path: Path) -> None:
    path = tmp_path / "plans.json"
    made = fxpass.plan(block(), *inputs(ROWS), world_size=2, patches=4)
    made.save(path)
    with pytest.raises(ValueError, match=r"has no plan of this kind: it has world_size=2, strategy='sync', patches=4"):
        lockstep(2, plan=path, patches=8)
    module: Any = fxpass.parallelize(block(), plan=path, executor="lockstep")
    torch.testing.assert_close(module(*inputs(ROWS))["sample"], whole(block(), *inputs(ROWS)))
    assert module.plan.fingerprint == made.fingerprint


@pytest.mark.parametrize(
    ("speeds", "patches", "rows", "counts"),
    [
        ((1.0, 0.6), None, [20, 12], (1, 1)),
        ((5, 1), None, [27, 5], (1, 1)),
        ((1, 1), None, [16, 16], (1, 1)),
        ((3, 1), 4, [8, 8, 8, 8], (3, 1)),
        ((3, 2), 5, [6, 7, 6, 7, 6], (3, 2)),
        ((2, 1), 2, [21, 11], (1, 1)),
        ((10, 1), 3, [15, 14, 3], (2, 1)),
    ],
)
def test_rows_are_in_proportion_to_speeds(
    speeds: tuple[float, ...], patches: int | None, rows: list[int], counts: tuple[int, ...]
) -> None:
    module = lockstep(2, patches=patches, speeds=speeds)
    torch.testing.assert_close(module(*inputs(ROWS))["sample"], whole(block(), *inputs(ROWS)))
    (cut,) = module.plan.cuts.values()
    assert [len(each) for each in cut.rows] == rows
    assert module.plan.placement == Placement(counts)


def test_speeds_to_which_no_rows_are_in_proportion_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shared among 2 ranks, but not in proportion .* 1/100 of the fastest one's"):
        fxpass.plan(block(), *inputs(ROWS), world_size=2, speeds=(100, 1))


def test_processes_of_different_speeds_give_what_lockstep_gives_bit_for_bit() -> None:
    options: dict[str, Any] = {"patches": 3, "speeds": (2, 1), **named("displaced")}
    with spawn(2, **options) as module:
        assert equal(module, lockstep(2, **options))


def test_each_group_has_the_speeds_and_where_there_are_none_all_processes_have() -> None:
    module = lockstep(4, cfg=2, speeds=(3, 1))
    torch.testing.assert_close(module(*inputs(ROWS))["sample"], whole(block(), *inputs(ROWS)))
    assert [list(map(len, cut.rows)) for cut in module.plan.cuts.values()] == [[24, 8]]
    sample, timestep = inputs(ROWS)
    module = lockstep(4, data=2, speeds=(3, 1))
    with pytest.warns(fxpass.FxpassWarning, match="not divided among 2 groups"):
        module(sample[:1], timestep)
    assert [list(map(len, cut.rows)) for cut in module.plan.cuts.values()] == [[12, 4, 12, 4]]


def test_plans_for_other_speeds_have_other_fingerprints(tmp_path: Path) -> None:
    plans = [fxpass.plan(block(), *inputs(ROWS), world_size=2, speeds=each) for each in (None, (2, 1), (2.001, 1))]
    assert len({plan.fingerprint for plan in plans}) == 3
    assert plans[1].cuts == plans[2].cuts
    plans[1].save(tmp_path / "plans.json")
    module: Any = fxpass.parallelize(block(), plan=tmp_path / "plans.json", executor="lockstep")
    module(*inputs(ROWS))
    assert module.plan.fingerprint == plans[1].fingerprint
    with pytest.raises(ValueError, match="speeds are part of the saved plan; leave them out"):
        lockstep(2, plan=tmp_path / "plans.json", speeds=(2, 1))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"patches": 1}, "1 patches are too few for the 2 processes; patches=2 or a multiple of it would do"),
    ({"patches": 5}, "5 patches cannot be dealt evenly to the 2 processes; 4 or 6 patches would do, or `speeds`"),
    ({"patches": 0}, "patches must be a whole number of at least 1, not 0"),
    ({"patches": True}, "patches must be a whole number of at least 1, not True"),
    ({"patches": 4.0}, "patches must be a whole number of at least 1, not 4.0"),
    (
        {"patches": 4, "strategy": "auto"},
        "patches and speeds are for a strategy that is named, not for strategy='auto'",
    ),
    ({"patches": 1, "speeds": (1, 2)}, "1 patches are too few for the 2 processes; patches=2 would do"),
    ({"speeds": (1, 2, 3)}, "speeds has 3 numbers, but needs one for each of the 2 processes: 2"),
    ({"speeds": (1, 0)}, "speeds are numbers above 0, not 0"),
    ({"speeds": (1, -1.0)}, "speeds are numbers above 0, not -1.0"),
    ({"speeds": (1, float("nan"))}, "speeds are numbers above 0, not nan"),
    ({"speeds": 2}, "speeds are numbers, one for each of the 2 processes, not 2"),
    ({"speeds": "12"}, "speeds are numbers, one for each of the 2 processes, not '12'"),
]


@pytest.mark.parametrize(("options", "words"), WRONG)
def test_patches_that_make_no_sense_are_refused_at_once(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        lockstep(2, **options)
    with pytest.raises(ValueError, match=re.escape(words)):
        fxpass.plan(block(), *inputs(), world_size=2, **options)


def test_steps_of_several_patches_are_not_recorded() -> None:
    with pytest.raises(ValueError, match=r"compile='graph' cannot record the steps of several patches in one process"):
        lockstep(2, patches=4, compile="graph")


def test_more_patches_than_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="64"):
        fxpass.plan(block(), *inputs(16), world_size=2, patches=64)
