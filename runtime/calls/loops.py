"""Methods that run one module again and again: each of these calls runs on all ranks by itself.

A decoder of videos works frame by frame, or tile by tile, in a Python loop. Captured as one program, the loop is
unrolled. Where that gives more operators than the budget, the loop stays in Python, on every rank, and the calls of the
module that it repeats are captured and split: a few programs, whatever the number of frames. What a call returns is
whole on every rank; what it leaves in its arguments (a cache of earlier frames) stays there as rows (`kept.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from ...ir.program import Program
from ..executor import PlanLike
from .attached import attached_for_now, attached_to
from .engine import Engine
from .kept import KeepingEngine, kept_outputs
from .module import ParallelModule

log = logging.getLogger("fxpass")


class Loops:
    """The modules of a model whose calls run on all ranks while a method of the model runs in Python."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._modules: dict[str, ParallelModule] = {}  #: by path
        self._attached: list[ParallelModule] = []  #: those whose calls run on all ranks now

    def add(self, paths: Sequence[str], method: str) -> None:
        """Let calls of these modules of the model run on all ranks."""
        for path in paths:
            module = self._engine.model.get_submodule(path)
            if path not in self._modules and attached_to(module) is None:
                self._modules[path] = ParallelModule(module, self._engine_of(module), required=False)
        kind = type(self._engine.model).__name__
        log.info("%s.%s runs in Python on every rank, and its calls of %s run on all", kind, method, ", ".join(paths))

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Calls of the modules within the context run on all ranks. The thread whose call it is may nest it."""
        before = self._attached
        new = [module for module in self._modules.values() if module not in before]
        self._attached = [*before, *new]
        try:
            with attached_for_now(new):
                yield
        finally:
            self._attached = before
            with self._engine.turn.taken():
                for module in self._modules.values():
                    module._engine.forget_unused()

    def close(self) -> None:
        for module in self._modules.values():
            module.close()

    def _engine_of(self, module: nn.Module) -> Engine:
        """An engine on the same processes. Nothing in it is a step of a generation, so nothing may be stale."""
        whole = self._engine

        def planner(program: Program) -> PlanLike:
            return whole.planner(replace(program, method="part", kept=kept_outputs(program)))

        return KeepingEngine(module, planner, whole.executor.share(), strict=whole.strict, turn=whole.turn)
