"""Runs one rank's program: as straight-line Python, or compiled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from .executor import Report, Step
from .interpreter import RankProgram, Transport, drive

if TYPE_CHECKING:
    from .lower import Compiled


class Runner:
    """A rank's program, compiled at its first call if that is asked for.

    Where attention has windows at displaced steps, shapes differ: then these are compiled for themselves.
    """

    def __init__(self, code: RankProgram, compile: bool) -> None:  # noqa: A002
        self.code = code
        self.compile = compile
        self._windows = any(site.steady is not site for site in code.sites)
        self._compiled: dict[bool, Compiled] = {}

    def run(self, values: Sequence[Tensor], transport: Transport, step: Step) -> list[Tensor]:
        """The flat outputs."""
        if not self.compile:
            return drive(self.code.run(values), transport)
        from .lower import Compiled

        displaced = self._windows and not step.exact
        if displaced not in self._compiled:
            self._compiled[displaced] = Compiled(self.code, displaced, values)
        return self._compiled[displaced].run(values, transport)

    @property
    def reports(self) -> list[Report]:
        """What has been compiled so far."""
        return [compiled.report for compiled in self._compiled.values()]
