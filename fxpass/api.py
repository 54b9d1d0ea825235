"""The public entry point: `fxpass.parallelize(model_or_pipeline)`."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from .inspect.words import bytes_text
from .ir.advice import warn
from .ir.program import Program, shape_of
from .ir.strategy import Strategy
from .make_plan import make_plan
from .plan import Plan
from .planning import ONE_EACH, Deal, check_target, check_world_size, groups_of, refuse_deal, strategy_of, target_of
from .predict.compare import slower_than_fewer
from .runtime import distributed
from .runtime.calls.engine import Engine
from .runtime.calls.turn import Turn
from .runtime.executor import COMPILERS, Compile, Executor
from .runtime.lockstep import LockstepExecutor
from .runtime.spawn import SpawnExecutor
from .saved import SavedPlan, load, plan_again

log = logging.getLogger("fxpass")
T = TypeVar("T")
EXECUTORS = ("auto", "distributed", "spawn", "lockstep")


def parallelize(
    model_or_pipeline: T,
    world_size: int | None = None,
    *,
    strategy: Strategy | str | None = None,
    warmup_steps: int | None = None,
    cfg: int = 1,
    data: int = 1,
    patches: int | None = None,
    speeds: Sequence[float] | None = None,
    stages: int = 1,
    executor: str = "auto",
    compile: Compile = False,  # noqa: A002 - the name that torch users expect
    target: str = "auto",
    link: str | None = None,
    strict: bool = False,
    ignore_tiling: bool = False,
    on_first_rank: bool | str | Collection[str] = False,
    weights_from_first_rank: bool = False,
    plan: str | Path | None = None,
    timeout: float = 600.0,
    group: Any = None,
) -> T:
    """Make a denoiser run on `world_size` processes. Use the result exactly like the original.

    A model is captured at its first call, and again when it is called with other shapes or was changed (an adapter, a
    scale, a global or closure that its forward reads). The model itself is left as it is.
    A pipeline (anything with a denoiser among its attributes) is returned itself, and so are its parts: the calls of
    its denoisers and of its autoencoders (`decode`, `encode`) run on all ranks from then on, and its scheduler says
    when a generation begins. `fxpass.parallel(pipe.unet)` gives what `parallelize(pipe.unet)` would have returned.
    What is parallel already is split anew, as these arguments say. `fxpass.restore` undoes it.

    Args:
        model_or_pipeline: a model in eval mode, or a pipeline.
        world_size: number of processes, each of which is one rank unless `patches` says otherwise; default: the size of
            the process group, else the number of CUDA devices.
        strategy: a `Strategy` or the name of a preset: "sync" (exact), "displaced" (stale, see `Strategy`), … "auto"
            takes what is predicted to be fastest on `target` and `link`: "displaced" or "sync", the number of groups
            (see `cfg`), and fewer ranks if that is faster; the others then do the same once more. Default: that of
            `plan`, else "sync".
        warmup_steps: number of exact steps before the first stale one; default: the strategy's.
        cfg: number of groups of ranks among which the guidance branches of a batch are divided: 2 for [negative,
            positive]. Each group of `world_size` / (`cfg` x `data`) ranks runs its samples in patches, and only outputs
            travel between groups. If the batch cannot be divided (guidance with a call for each branch),
            `cfg` calls run at once, each on a group: the first ones return deferred tensors. Other calls (samples
            depend on each other, arguments are written to) run on all ranks in patches, and a warning says why.
            `decode` and `encode` do so always.
        data: number of groups among which the prompts of a batch are divided. `cfg` x `data` groups take equal parts of
            the batch, in its order. With `data` above 1, calls of single branches are not run at once.
        patches: number of patches of each group, a multiple of its processes; each process runs as many ranks, in turn.
            Default: one for each process. `decode` and `encode` have that always. Not with strategy="auto".
        speeds: of each process of a group, in any unit: rows are cut in proportion, as far as the model allows. With
            them, `patches` need not be a multiple of the processes.
        stages: number of parts into which the depth of the model is cut. Each part has an equal number of processes of
            each group, which share its patches, and needs its own weights alone. Exact steps take as long as with
            one stage; at displaced steps of `strategy="asyncdiff"` all stages work at once. `decode` and `encode` run
            on patches alone.
        executor: "distributed" (torchrun or an initialised process group: every rank runs the script), "spawn" (this
            process is rank 0 and drives workers, on CUDA one for each further device), "lockstep" (all ranks in this
            process, in turn, however many processes there would be), or "auto": distributed if there are several
            processes, else spawn.
        compile: compile every rank's steps. "inductor": by torch.compile's backend; the first call takes long, later
            calls and processes load the result from Inductor's cache. "graph": record them as CUDA graphs, where all
            ranks are on GPUs of one machine that can map each other's memory. "inductor+graph": both. True: the last on
            CUDA, the first on CPUs.
        target: the device to plan for, or a file of `fxpass calibrate` (docs/targets.md).
        link: what joins the ranks. If it or a target is given, a warning says if fewer ranks would be faster.
        strict: raise `FallbackError` at the first call if an operator cannot be split. Otherwise such operators run
            whole on every rank, and a warning names them.
        ignore_tiling: split a whole `decode` or `encode` although tiling is switched on (`enable_tiling`): ranks save
            the memory that tiles were to save. The result is the untiled one; a call that runs unsplit stays tiled.
        on_first_rank: names of parts of a pipeline that are not split (text encoders, a safety checker), or True: all
            of these. Under torchrun rank 0 alone runs them, and sends what they return; the others may leave their
            weights on the CPU or on "meta". With "spawn" and "lockstep" one process runs them anyway.
        weights_from_first_rank: under torchrun, all ranks get the weights that rank 0 has loaded, at once; the others
            may have built the same modules on "meta", or with any values. No effect with "spawn" and "lockstep".
        plan: a file of plans (`Plan.save`): its cuts, world size and strategy are used, and nothing is searched. A call
            that none of them fits is an error.
        timeout: seconds to wait for another rank before raising an error.
        group: the process group to use; default: all processes.

    Raises:
        ValueError: an argument is invalid; the message lists the valid values.
        TypeError: the first argument is neither a module nor a pipeline with a denoiser.
    """
    from .models.pipelines import untiled
    from .one_rank import chosen_parts, leave_to_first, send_weights
    from .pipeline import split_module, split_pipeline

    check_target(target, link)
    alone = chosen_parts(model_or_pipeline, on_first_rank)
    saved = None if plan is None else _selected(plan, world_size, strategy, groups_of(0, cfg, data), patches, stages)
    if saved and speeds is not None:
        raise ValueError("speeds are part of the saved plan; leave them out, or make another plan")
    if saved and warmup_steps is not None:
        raise ValueError("warmup_steps is part of the saved plan's strategy; leave it out, or make another plan")
    if not isinstance(compile, bool) and compile not in COMPILERS:
        raise ValueError(f"compile is True, False, {', '.join(map(repr, COMPILERS))}, not {compile!r}")
    if executor not in EXECUTORS:
        near = difflib.get_close_matches(str(executor), EXECUTORS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(EXECUTORS)}"
        raise ValueError(f"unknown executor {executor!r}; {hint}")
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
        raise ValueError(f"timeout must be a number of seconds above 0, not {timeout!r}")
    world = _world_size(saved[0].processes if saved else world_size, executor, group)
    groups = groups_of(world, cfg, data)
    deal = saved[0].deal if saved else Deal.of(world, groups, patches, speeds, stages)
    if deal.stages > 1 and "graph" in str(compile):
        raise ValueError(
            f"compile={compile!r} cannot record the steps of stages as CUDA graphs; use compile='inductor', or leave "
            "stages out"
        )
    if deal.counts and "graph" in str(compile):
        raise ValueError(
            f"compile={compile!r} cannot record the steps of several patches in one process as CUDA graphs; use "
            "compile='inductor', or leave patches out"
        )
    graphs, named = compile is True or "graph" in str(compile), "sync" if strategy is None else strategy
    chosen = saved[0].strategy if saved else strategy_of(named, graphs=graphs)
    refuse_deal(chosen, deal)
    apart = Deal(deal.counts, deal.speeds * groups, deal.stages)
    whole = (
        ONE_EACH if saved else Deal.of(world, 1, None, None if speeds is None else [*speeds] * (groups * deal.stages))
    )
    if warmup_steps is not None:
        chosen = _with_warmup(chosen, warmup_steps)

    def planned(program: Program) -> Plan:
        if program.method != "forward":  # it is no step of a generation: nothing may be stale, and no plan is saved
            return make_plan(program, world, Strategy(), target, link, deal=whole, strict=strict)
        if saved:
            return plan_again(program, saved, target_of(target, program, link))
        together = cfg > 1 and data == 1
        return make_plan(
            program, world, chosen, target, link, groups=groups, deal=deal, together=together, strict=strict
        )

    def one_by_one(program: Program) -> Plan:
        return make_plan(program, world, chosen, target, link, deal=apart, strict=strict)

    first = _executor(executor, world, timeout, group, compile)
    if weights_from_first_rank and isinstance(first, distributed.DistributedExecutor):
        send_weights(model_or_pipeline, alone, first)
    unused, turn = [first], Turn(one_thread=isinstance(first, distributed.DistributedExecutor))

    def engine_of(model: nn.Module) -> Engine:
        """Engines of several parts of a pipeline use the same processes, one after the other."""
        planner = _warning(planned, slow=(target, link) != ("auto", None))
        own = unused.pop() if unused else first.share()
        capturing = untiled if ignore_tiling else nullcontext
        return Engine(model, planner, own, strict=strict, turn=turn, capturing=capturing, apart=one_by_one)

    if isinstance(model_or_pipeline, nn.Module):
        return split_module(model_or_pipeline, engine_of)
    split_pipeline(model_or_pipeline, engine_of)
    if isinstance(first, distributed.DistributedExecutor):
        leave_to_first(model_or_pipeline, alone, first, turn)
    return model_or_pipeline


def _with_warmup(strategy: Any, warmup_steps: int) -> Strategy:
    if not isinstance(strategy, Strategy):
        raise ValueError("warmup_steps is for a strategy that is named, not for strategy='auto'")
    if isinstance(warmup_steps, bool) or not isinstance(warmup_steps, int):
        raise ValueError(f"warmup_steps is a number of steps, not {warmup_steps!r}")
    if strategy.exact and warmup_steps:
        raise ValueError(f"warmup_steps has no effect on {strategy.name!r}: all its steps are exact")
    return replace(strategy, warmup_steps=warmup_steps)


def _world_size(world_size: int | None, executor: str, group: Any) -> int:
    if world_size is None:
        if group is not None or (executor in ("auto", "distributed") and distributed.inside()):
            return distributed.size_of_world(group)
        if torch.cuda.device_count():
            return torch.cuda.device_count()
        raise ValueError("pass the number of ranks, e.g. world_size=2: there is no process group and no CUDA device")
    return check_world_size(world_size)


def _selected(
    path: str | Path,
    world_size: int | None,
    strategy: Strategy | str | None,
    groups: int,
    patches: int | None,
    stages: int,
) -> tuple[SavedPlan, ...]:
    """The plans in a file for this world size, strategy, number of groups and of stages (1: any) and of patches, all of
    one kind.

    Raises:
        OSError, ValueError: the file cannot be read, or holds none of these or several kinds.
    """
    saved = load(path)
    wanted = None if strategy is None else Strategy.of(strategy)
    found = [
        s
        for s in saved
        if world_size in (None, s.processes) and patches in (None, s.patches) and wanted in (None, s.strategy)
    ]
    found = [s for s in found if groups in (1, s.groups // s.copies) and stages in (1, s.stages)]
    kinds = {(each.world_size, each.deal, each.groups, each.copies, each.strategy) for each in found}
    if len(kinds) == 1:
        return tuple(found)
    known = ", ".join(sorted(set(map(_kind, saved)))) or "none"
    what = (
        "several kinds of plans; say which by world_size, strategy, cfg, stages and patches"
        if kinds
        else "no plan of this kind"
    )
    raise ValueError(f"{path} has {what}: it has {known}")


def _kind(saved: SavedPlan) -> str:
    """The kind of a saved plan, for messages."""
    kind = f"world_size={saved.processes}, strategy={saved.strategy.name!r}"
    kind += f", {saved.groups} groups" * (saved.groups > 1) + f", stages={saved.stages}" * (saved.stages > 1)
    return kind + f", patches={saved.patches}" * bool(saved.counts)


def _warning(planner: Callable[[Program], Plan], *, slow: bool) -> Callable[[Program], Plan]:
    """A planner that warns of operators that cannot be split, and, once and if `slow`, of a split that slows down."""

    def planned(program: Program) -> Plan:
        nonlocal slow
        plan = planner(program)
        if log.isEnabledFor(logging.INFO):
            log.info("a new kind of call: %s", _costs(plan))
        if slow and (hint := slower_than_fewer(plan.program, plan.predict())):
            warn(hint)
        slow = False
        if plan.gathered:
            warn(
                f"{len(plan.gathered)} operators cannot be split and run whole on every rank (strict=True refuses them)"
                ":\n" + "\n".join(f"  {each}" for each in plan.gathered)
            )
        return plan

    return planned


def _costs(plan: Plan) -> str:
    """What a kind of call costs once, in time, and as long as its program is kept, in memory."""
    program = plan.program
    shapes = {node.name: list(shape_of(node)) for node in program.graph.nodes if node.name in program.inputs}
    given = zip(program.inputs, program.input_paths, strict=True)
    inputs = ", ".join(f"{path} {shapes[name]}" for name, path in given)
    memory = plan.predict().memory
    return (
        f"{inputs}; captured in {sum(program.seconds.values()):.1f} s, planned in {plan.seconds['plan']:.1f} s; a "
        f"rank needs about {bytes_text(memory.activations)} of activations in a call, and {bytes_text(memory.state)} "
        "from step to step"
    )


def _executor(name: str, world: int, timeout: float, group: Any, compile: Compile) -> Executor:  # noqa: A002
    if name == "auto":
        name = "distributed" if group is not None or distributed.inside() else "spawn" if world > 1 else "lockstep"
    if name == "distributed":
        return distributed.DistributedExecutor(world, group=group, timeout=timeout, compile=compile)
    if name == "spawn":
        return SpawnExecutor(world, timeout=timeout, compile=compile)
    return LockstepExecutor(world, compile=compile)
