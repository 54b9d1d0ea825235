"""Check the arguments of planning: world size, groups, target, strategy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .ir.advice import warn
from .ir.mesh import Placement
from .ir.program import Program
from .ir.strategy import Strategy
from .passes import Build
from .passes.targets import Target, find
from .predict.choose import Choice, choose, choose_strategy


def groups_of(world_size: int, cfg: Any, data: Any) -> int:
    """The number of groups among which the samples of a batch are divided.

    Raises:
        ValueError: `cfg` or `data` is no whole number of at least 1, or the ranks cannot be divided evenly.
    """
    for name, value in (("cfg", cfg), ("data", data)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
    if world_size % (cfg * data):
        raise ValueError(
            f"{world_size} ranks cannot be divided into cfg x data = {cfg} x {data} groups of equal size; "
            f"world_size must be a multiple of {cfg * data}"
        )
    return cfg * data


@dataclass(frozen=True)
class Deal:
    """How the stages and the patches of a group are dealt to its processes.

    Attributes:
        counts: how many patches each process runs, of all groups and stages; () if each runs one.
        speeds: of the ranks of a stage; () if all are the same.
        stages: of each group.
    """

    counts: tuple[int, ...] = ()
    speeds: tuple[float, ...] = ()
    stages: int = 1

    def __bool__(self) -> bool:
        return bool(self.counts or self.speeds or self.stages > 1)

    def ranks(self, processes: int) -> int:
        """How many ranks so many processes run."""
        return sum(self.counts) or processes

    def placement(self, processes: int) -> Placement:
        """Which of so many processes runs which ranks."""
        return Placement(self.counts) if self.counts else Placement.one_each(processes)

    @staticmethod
    def of(world_size: int, groups: int, patches: Any, speeds: Any, stages: Any = 1) -> Deal:
        """
        Args:
            world_size: the number of processes.
            patches: of each group; None: one for each process of a stage.
            speeds: of the processes of a stage, in any unit; None: all are the same. Each gets rows in proportion, in
                as many patches as make all patches most alike.
            stages: of each group; each has as many processes.

        Raises:
            ValueError: `patches` or `stages` is no whole number of at least 1, or cannot be dealt to the processes of a
                group; `speeds` are not as many numbers above 0 as a stage has processes.
        """
        processes = world_size // groups // _checked(stages, world_size // groups, groups)
        where = f"the {processes} processes" + (" of each stage" if stages > 1 else " of each group" * (groups > 1))
        fast = _speeds(speeds, processes, where)
        if patches is None:
            patches = processes
        if isinstance(patches, bool) or not isinstance(patches, int) or patches < 1:
            raise ValueError(f"patches must be a whole number of at least 1, not {patches!r}")
        if patches < processes:
            multiple = " or a multiple of it" * (not fast)
            raise ValueError(f"{patches} patches are too few for {where}; patches={processes}{multiple} would do")
        if patches % processes and not fast:
            fewer = patches - patches % processes
            raise ValueError(
                f"{patches} patches cannot be dealt evenly to {where}; {fewer} or {fewer + processes} patches would "
                "do, or `speeds`"
            )
        fast = fast or (1.0,) * processes
        counts = _dealt(patches, fast)
        own = tuple(speed / count for speed, count in zip(fast, counts, strict=True) for _ in range(count))
        every = counts * (groups * stages) if patches > processes else ()
        return Deal(every, own if len(set(own)) > 1 else (), stages)


ONE_EACH = Deal()  #: every process runs one patch, and all are equally fast


def _checked(stages: Any, processes: int, groups: int) -> int:
    """`stages`, if the processes of a group can be dealt to them evenly; else raises `ValueError`."""
    if isinstance(stages, bool) or not isinstance(stages, int) or stages < 1:
        raise ValueError(f"stages must be a whole number of at least 1, not {stages!r}")
    if processes % stages:
        where = f"{processes} processes" + " of each group" * (groups > 1)
        fitting = " or ".join(str(each) for each in range(1, processes + 1) if processes % each == 0)
        raise ValueError(f"the {where} cannot be divided evenly into {stages} stages; stages={fitting} would do")
    return stages


def _speeds(speeds: Any, processes: int, where: str) -> tuple[float, ...]:
    """`speeds` as a tuple, () for None. Raises as `Deal.of`."""
    if speeds is None:
        return ()
    if isinstance(speeds, str) or not isinstance(speeds, Sequence):
        raise ValueError(f"speeds are numbers, one for each of {where}, not {speeds!r}")
    for each in speeds:
        if isinstance(each, bool) or not isinstance(each, (int, float)) or not 0 < each < float("inf"):
            raise ValueError(f"speeds are numbers above 0, not {each!r}")
    if len(speeds) != processes:
        raise ValueError(f"speeds has {len(speeds)} numbers, but needs one for each of {where}: {processes}")
    return tuple(map(float, speeds))


def _dealt(patches: int, speeds: Sequence[float]) -> tuple[int, ...]:
    """So many patches in proportion to speeds, at least one for each: the next one goes where patches are largest."""
    counts = [1] * len(speeds)
    for _ in range(patches - len(speeds)):
        counts[max(range(len(speeds)), key=lambda i: speeds[i] / counts[i])] += 1
    return tuple(counts)


#: chooses how so many ranks, divided into so many groups (1: any number), share a program
Chooser = Callable[[Program, int, int, Target], Choice]


def refuse_deal(strategy: Strategy | Chooser, deal: Deal) -> None:
    """Raises `ValueError` if a deal does not go with a strategy.

    The strategy, with the mesh, is chosen, but stages, patches or speeds are given; or the strategy lets stages work at
    once, and there is only one.
    """
    if deal and not isinstance(strategy, Strategy):
        raise ValueError("stages, patches and speeds are for a strategy that is named, not for strategy='auto'")
    if deal.stages == 1 and isinstance(strategy, Strategy) and strategy.overlaps:
        raise ValueError(
            f"strategy {strategy.name!r} lets the stages of a model work at once, and stages=1: give stages=2 or more, "
            "of as many processes each, or strategy='displaced' for patches"
        )


def strategy_of(strategy: str | Strategy, *, graphs: bool = False) -> Strategy | Chooser:
    """The strategy of that name; for "auto", what chooses one and the mesh.

    Args:
        graphs: kernels are launched together, as CUDA graphs do.

    Raises:
        ValueError: the name is unknown.
    """

    def chosen(program: Program, world: int, groups: int, target: Target) -> Choice:
        if groups > 1:
            return Choice(choose_strategy(program, world // groups, target, graphs=graphs), groups)
        return choose(program, world, target, graphs=graphs)

    return chosen if strategy == "auto" else Strategy.of(strategy, "auto")


def warn_undivided(state: Build, groups: int) -> None:
    """Warn if the samples of a batch could not be divided among so many groups."""
    if state.mixed:
        warn(
            f"the batch is not divided among {groups} groups of ranks, so all {state.world} ranks work on patches of "
            f"all samples: {state.mixed}"
        )


def check_world_size(world_size: Any) -> int:
    """Raises `ValueError` unless `world_size` is a whole number of at least 1."""
    if isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1:
        raise ValueError(f"world_size must be a whole number of at least 1, not {world_size!r}")
    return world_size


def check_target(target: Any, link: str | None = None) -> None:
    """Raises `ValueError` unless `target` is a `Target`, "auto", the name of a device or a file that describes one."""
    if isinstance(target, Target) and link is None:
        return
    if not isinstance(target, str):
        raise ValueError(f"target is a name, a file or (without link) a Target, not {target!r}")
    find(target, link)


def target_of(target: str | Target, program: Program, link: str | None = None) -> Target:
    """The target of this name; "auto" follows the device of the program's tensors.

    Args:
        link: the name of the link between ranks; None: the one that the device names.

    Raises:
        ValueError: there is no such target or link; the message suggests the nearest.
    """
    if isinstance(target, Target):
        return target
    if target == "auto":
        devices: Sequence[str] = [
            n.meta["val"].device.type for n in program.graph.nodes if "val" in n.meta and "shape" in n.meta
        ]
        target = "gpu" if "cuda" in devices else "cpu"
    return find(target, link)
