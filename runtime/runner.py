"""Runs one rank's program: as straight-line Python, or compiled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .executor import Report, Step
from .interpreter import RankProgram, Transport, drive

if TYPE_CHECKING:
    from .lower import Compiled


FORMS = 8  #: compiled forms of one program that are kept; the oldest goes first


class Runner:
    """Runs one rank's program, interpreted or compiled.

    It is compiled again for values of other strides (a weight replaced by its transposed view), and for displaced
    steps if their attention has windows, which changes shapes.
    """

    def __init__(self, code: RankProgram, compile: bool) -> None:  # noqa: A002
        self.code = code
        self.compile = compile
        self._windows = any(site.steady is not site for site in code.sites)
        self._compiled: dict[Any, Compiled] = {}  # by form

    def run(self, values: Sequence[Tensor], transport: Transport, step: Step) -> list[Tensor]:
        """The flat outputs."""
        if not self.compile:
            return drive(self.code.run(values), transport)
        from .lower import Compiled

        displaced = self._windows and not step.exact
        form = displaced, tuple(value.stride() for value in values)
        if form not in self._compiled:
            while len(self._compiled) >= FORMS:
                del self._compiled[next(iter(self._compiled))]
            self._compiled[form] = Compiled(self.code, displaced, values)
        return self._compiled[form].run(values, transport)

    @property
    def reports(self) -> list[Report]:
        """What has been compiled so far."""
        return [compiled.report for compiled in self._compiled.values()]
