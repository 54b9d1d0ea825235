"""What each rank of test_distributed.py runs: `python -m tests.runtime.ranks SCENARIO FOLDER`.

Writes what it saw to FOLDER/<rank>.json.
"""

from __future__ import annotations

import gc
import json
import os
import random
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import fxpass
from fxpass.ir.advice import warn
from fxpass.ir.program import exchanges_of
from fxpass.ir.strategy import Strategy
from fxpass.runtime.distributed import DistributedExecutor
from fxpass.runtime.lockstep import LockstepExecutor
from fxpass.runtime.process_group import GroupChannel
from fxpass.runtime.shared_memory import MemoryChannel
from tests.runtime.calls import feeding
from tests.runtime.plans import Pipeline, block, inputs, parallel, steps, whole

STRATEGIES = [
    *(
        replace(Strategy.of(name), warmup_steps=2)
        for name in ("displaced", "stale_gn", "no_sync", "pcpp", "compressed")
    ),
    Strategy("windows of codes", "stale", "stale", "stale", window=0.3, bits=4, warmup_steps=2),
]
RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def attempt(action: Callable[[], Any], limit: int = 30) -> str:
    """The error that an action raises, and whether it took less than `limit` seconds."""
    start = time.monotonic()
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__} after {f'<{limit} s' if time.monotonic() - start < limit else 'long'}: {error}"
    return "nothing"


def speaks() -> bool:
    """Whether this rank warns at all."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        warn("something")
    return bool(given)


def warns() -> bool:
    """Whether this rank gives the warning that its steps are all exact."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Conv2d(4, 4, 3, padding=1).eval()
    module: Any = fxpass.parallelize(model, strategy="displaced")
    with warnings.catch_warnings(record=True) as given, torch.no_grad():
        warnings.simplefilter("always")
        module(torch.ones(1, 4, 8, 8))
    module.close()
    return any("no input that is known to be a timestep" in str(each.message) for each in given)


@contextmanager
def patched(name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Channels of all kinds whose method `name` is wrapped: `wrapper(channel, …, method)`."""
    were = {kind: getattr(kind, name) for kind in (MemoryChannel, GroupChannel)}
    for kind, method in were.items():
        setattr(kind, name, lambda channel, *args, method=method: wrapper(channel, *args, method))
    try:
        yield
    finally:
        for kind, method in were.items():
            setattr(kind, name, method)


def shared_files() -> int:
    """How many files of shared memory this process has open, and mappings of them."""
    gc.collect()
    opened = [
        os.readlink(f"/proc/self/fd/{name}")
        for name in os.listdir("/proc/self/fd")
        if os.path.lexists(f"/proc/self/fd/{name}")
    ]
    return sum("memfd:fxpass" in name for name in [*opened, *Path("/proc/self/maps").read_text().splitlines()])


def shared_memory() -> int:
    """Bytes of shared memory that this process uses, as the kernel counts them."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = "memfd:fxpass" in line
        elif ours and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


def held() -> dict[str, int]:
    """What a rank really holds between displaced steps, and what its plan says."""
    gc.collect()
    before = shared_memory()
    wide = block(channels=64)  # large messages, little work
    with parallel(wide, DistributedExecutor(WORLD, timeout=60), Strategy.of("stale_gn")) as module:
        for call in steps(8, rows=512):
            module(*call)
        (entry,) = module._engine.programs.all()
        declared = [each for _, some in exchanges_of(entry.plan.graph) for each in some]
        stale = [each for each in declared if each.fresh == "stale"]
        used = shared_memory() - before
    return {
        "used": used,
        "nodes": len(list(exchanges_of(entry.plan.graph))),
        "received": sum(each.received(RANK) for each in stale),
        "other": sum(each.received(RANK) for each in declared if each not in stale),
        "sent": sum(each.numel(RANK, 1 - RANK) * each.dtype.itemsize for each in declared),
    }


def resources() -> dict[str, int]:
    """What this process holds: tensors and their bytes, open files, threads, collectives that nobody awaited."""
    gc.collect()
    storages = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
        for each in gc.get_objects()
        if type(each) is torch.Tensor and each.device.type == "cpu"
    }
    return {
        "storages": len(storages),
        "bytes": sum(storages.values()),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "collectives": torch._C._distributed_c10d._get_work_registry_size(),
    }


def endures() -> dict[str, dict[str, int]]:
    """What a rank holds after ten displaced steps, and after a thousand."""
    found = {}
    with parallel(block(), DistributedExecutor(WORLD, timeout=60), Strategy.of("displaced")) as module:
        ((sample, timestep),) = steps(1)
        with module.generation():
            for k in range(1004):
                module(sample + 1e-4 * k, timestep - 1e-5 * k)
                if k in (13, 1003):
                    found[str(k - 3)] = resources()
    return found


def pipeline() -> dict[str, Any]:
    """Two denoisers of a pipeline in turn, then one of them after the other was closed."""
    models = {"unet": block(), "prior": block(1, 32)}
    expected = {name: parallel(model, LockstepExecutor(WORLD))(*inputs())["sample"] for name, model in models.items()}
    pipe: Any = Pipeline(**models)
    fxpass.parallelize(pipe, WORLD, executor="distributed", timeout=60)
    names = ["unet", "prior", "unet", "prior"]
    equal = [torch.equal(getattr(pipe, name)(*inputs())["sample"], expected[name]) for name in names]
    handles = {name: fxpass.parallel(model) for name, model in models.items()}
    executors: list[Any] = [handle._engine.executor for handle in handles.values()]
    shared = executors[0]._ranks.network is executors[1]._ranks.network is not None
    with ThreadPoolExecutor(1, "another") as pool:
        refused = pool.submit(attempt, lambda: pipe.unet(*inputs())).result()
    handles["unet"].close()
    equal.append(torch.equal(pipe.prior(*inputs())["sample"], expected["prior"]))
    found = {"equal": equal, "shared": shared, "traffic": [sum(each.traffic.values()) for each in handles.values()]}
    found["refused"] = refused
    found["apart"] = [attempt(lambda: pipe.prior(*inputs(22 if RANK else 16))), attempt(lambda: pipe.prior(*inputs()))]
    fxpass.restore(pipe)
    return found | {"gone": executors[1]._ranks.network is None}


def feeds() -> dict[str, Any]:
    """A part that feeds a denoiser, as in lockstep; rank 0 looks at what the part returns, and rank 1 does not."""
    named: dict[str, Any] = {"strategy": "displaced", "warmup_steps": 1}

    def look(fed: Any) -> Any:
        if RANK == 0:
            fed[1][:, 1:].mean().item()
        return [each * 0.5 for each in fed[0]], fed[1]

    lockstep = feeding.pipeline(lambda fed: ([each * 0.5 for each in fed[0]], fed[1]))
    expected = feeding.generation(fxpass.parallelize(lockstep, WORLD, executor="lockstep", **named), 4)
    pipe = feeding.pipeline(look)
    fxpass.parallelize(pipe, WORLD, executor="distributed", timeout=60, **named)
    equal = [torch.equal(*pair) for _ in range(2) for pair in zip(feeding.generation(pipe, 4), expected, strict=True)]
    alone = [len(fxpass.parallel(each).traffic) for each in (pipe.unet, pipe.controlnet)]
    fxpass.restore(pipe)
    return {"equal": equal, "alone": alone}


def everything() -> dict[str, Any]:
    seen: dict[str, Any] = {"endures": endures(), "pipeline": pipeline(), "feeds": feeds()}
    seen["other world"] = attempt(lambda: fxpass.parallelize(block(), WORLD + 1))

    model = block()
    module = parallel(model, DistributedExecutor(WORLD, timeout=60))
    expected = parallel(model, LockstepExecutor(WORLD))
    seen["equal"] = [
        torch.equal(module(*inputs(rows, seed))["sample"], expected(*inputs(rows, seed))["sample"])
        for rows in (16, 22)
        for seed in (0, 1)
    ]
    seen["backend"] = dist.get_backend()
    seen["warns"] = warns()
    seen["traffic"] = dict(module.traffic)
    sample, timestep = inputs()
    sample[:, 0, -1, 0] = float("nan")
    seen["nan"] = bool(module(sample, timestep)["sample"].isnan().any())

    # a group that is not the default one
    group = dist.new_group(list(range(WORLD)), timeout=timedelta(seconds=60))
    grouped = parallel(model, DistributedExecutor(WORLD, group=group, timeout=60))
    seen["group"] = torch.equal(grouped(*inputs())["sample"], expected(*inputs())["sample"])

    other = block()
    if RANK == 1:
        with torch.no_grad():
            other.key.weight[3, 3] += 1
    seen["weights"] = attempt(lambda: parallel(other, DistributedExecutor(WORLD, timeout=60))(*inputs()))
    seen["inputs"] = attempt(lambda: parallel(model, DistributedExecutor(WORLD, timeout=60))(*inputs(seed=RANK)))
    seen["shapes"] = attempt(lambda: parallel(model, DistributedExecutor(WORLD, timeout=60))(*inputs(16 + 2 * RANK)))
    drifting = parallel(model, DistributedExecutor(WORLD, timeout=60))
    seen["drifting"] = [attempt(lambda s=s: drifting(*inputs(seed=s))) for s in (0, RANK, 1, 2)]  # the second is unlike
    drifting.close()
    # rank 1 leaves a picture after two steps, and begins the next one
    calls = steps(4)
    left = parallel(model, DistributedExecutor(WORLD, timeout=60))
    left.reset()
    seen["left early"] = [attempt(lambda c=c: left(*c)) for c in calls[:2]]
    if RANK == 1:
        left.reset()
    seen["left early"].append(attempt(lambda: left(*calls[2 if RANK == 0 else 0])))
    left.reset()
    seen["left early"].append(attempt(lambda: left(*calls[0])))
    left.close()
    # the time of one rank rises, which begins a generation for it alone; "no_sync" sends little at other steps
    unlike = parallel(model, DistributedExecutor(WORLD, timeout=60), replace(Strategy.of("no_sync"), warmup_steps=1))
    calls = steps(4)
    if RANK == 1:
        calls[2] = (calls[2][0], calls[0][1] * 1.1)
    seen["unlike steps"] = [attempt(lambda c=c: unlike(*c)) for c in calls]
    unlike.close()
    closed = parallel(model, DistributedExecutor(WORLD, timeout=600))
    closed(*inputs())
    if RANK == 1:
        closed.close()
    seen["closed"] = attempt(lambda: closed(*inputs()), limit=10)
    closed.close()
    lonely = parallel(model, DistributedExecutor(WORLD, timeout=2))
    seen["absent"] = attempt(lambda: RANK == 0 and lonely(*inputs()))

    # ranks that are early and late by turns
    rng = random.Random(RANK)

    def unsteady(channel: Any, rank: int, packed: Any, put: Callable[..., None]) -> None:
        time.sleep(rng.choice((0, 0, 0.001, 0.003)))
        put(channel, rank, packed)

    with patched("put", unsteady):
        seen["unsteady"] = all(
            torch.equal(module(*inputs(16, seed))["sample"], expected(*inputs(16, seed))["sample"])
            for seed in range(12)
        )
    seen["files"] = shared_files()

    # the memory of what was put is used for something else until it is awaited
    kept: dict[Any, list[tuple[Any, Any]]] = {}

    def scribbling(channel: Any, rank: int, packed: Any, put: Callable[..., None]) -> None:
        sent = [part for parts in packed for part in parts if part is not None]
        kept[channel] = [(part, part.clone()) for part in sent]
        put(channel, rank, packed)
        for part in sent:
            part.fill_(7.0)

    def restored(channel: Any, rank: int, number: int, get: Callable[..., Any]) -> Any:
        for part, then in kept.pop(channel, []):
            part.copy_(then)
        return get(channel, rank, number)

    with patched("put", scribbling), patched("get", restored):
        seen["copied"] = all(
            torch.equal(module(*inputs(16, seed))["sample"], expected(*inputs(16, seed))["sample"]) for seed in range(3)
        )

    kept.clear()  # it holds channels
    seen["displaced"] = []
    for strategy in STRATEGIES:
        moving = parallel(model, DistributedExecutor(WORLD, timeout=60), strategy)
        reference = parallel(model, LockstepExecutor(WORLD), strategy)
        generations = [*steps(5), *steps(4, seed=1), *steps(3, rows=22)]
        pairs = [(moving(*call)["sample"], reference(*call)["sample"]) for call in generations]
        seen["displaced"].append(all(torch.equal(a, b) for a, b in pairs))
        moving.close()
    # the timestep that was announced as the last is not: an exact step in the middle
    strategy = replace(Strategy.of("compressed"), warmup_steps=2)
    moving = parallel(model, DistributedExecutor(WORLD, timeout=60), strategy)
    reference = parallel(model, LockstepExecutor(WORLD), strategy)
    calls = steps(8)
    for each in (moving, reference):
        each.reset([float(time) for _, time in calls[:5]])
    found = [moving(*call)["sample"] for call in calls]
    seen["middle"] = [torch.equal(a, reference(*call)["sample"]) for a, call in zip(found, calls, strict=True)]
    unsplit = [whole(model, *call) for call in calls]
    seen["exact"] = [torch.allclose(a, b, atol=1e-5) for a, b in zip(found, unsplit, strict=True)]
    moving.close()

    seen["held"] = held()
    grouped.close()
    module.close()
    seen["files of closed modules"] = shared_files()

    # one rank fails while it captures, the others are in the middle of a call
    failing = parallel(block(), DistributedExecutor(WORLD, timeout=60))
    failing(*inputs())
    if RANK == 1:
        failing.key = torch.nn.Linear(3, 3)
    seen["raises"] = attempt(lambda: failing(*inputs()))
    seen["after"] = attempt(lambda: failing(*inputs()))
    return seen


def killed() -> dict[str, Any]:
    module = parallel(block(), DistributedExecutor(WORLD, timeout=60))
    module(*inputs())
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"error": attempt(lambda: module(*inputs()))}


def stopped() -> dict[str, Any]:
    module = parallel(block(), DistributedExecutor(WORLD, timeout=600))
    module(*inputs())
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    return {"error": attempt(lambda: module(*inputs()), limit=10)}


def uneven() -> dict[str, Any]:
    """Ranks 0 and 1, and ranks 1 and 2, each run a model of their own: rank 1 has one executor more than the others."""
    speaking = [speaks()]
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    pairs = [(0, 1), (1, 2)]
    groups = [dist.new_group(pair) for pair in pairs]
    mine = [group for pair, group in zip(pairs, groups, strict=True) if RANK in pair]
    modules = [parallel(block(), DistributedExecutor(2, group=group, timeout=20)) for group in mine]
    expected = parallel(block(), LockstepExecutor(2))(*inputs())["sample"]
    speaking.append(speaks())
    equal = [torch.equal(module(*inputs())["sample"], expected) for module in modules]
    DistributedExecutor(WORLD)
    speaking.append(speaks())
    return {"equal": equal, "speaks": speaking}


def alone() -> dict[str, Any]:
    """Rank 0 makes the first call of all, and another; rank 1 none."""
    module = parallel(block(), DistributedExecutor(WORLD, timeout=2))
    return {"errors": [attempt(lambda: RANK == 0 and module(*inputs())) for _ in range(2)]}


def first_call_fails() -> dict[str, Any]:
    """Rank 1 fails while it captures for the first call of all."""
    model = block()
    if RANK == 1:
        model.key = torch.nn.Linear(3, 3)
    module = parallel(model, DistributedExecutor(WORLD, timeout=60))
    return {"error": attempt(lambda: module(*inputs()))}


SCENARIOS = [everything, killed, stopped, uneven, alone, first_call_fails]

if __name__ == "__main__":
    torch.set_num_threads(1)
    result = {each.__name__: each for each in SCENARIOS}[sys.argv[1]]()
    Path(sys.argv[2], f"{RANK}.json").write_text(json.dumps(result))
    # rank 0 keeps the store
    if sys.argv[1] in ("killed", "stopped"):
        survivors = [rank for rank in range(WORLD) if rank != 1]
        until = time.monotonic() + 60
        while not all(Path(sys.argv[2], f"{rank}.json").exists() for rank in survivors) and time.monotonic() < until:
            time.sleep(0.1)
    elif dist.is_initialized() and sys.argv[1] != "alone":
        dist.barrier()
