"""The source of a step program: a Python generator function that yields at each put and get.

    v811 = f3(v810, v4, None, (1, 1))  # conv2d_7 (mid.resnets.0.conv1)
    v812 = f5(v811, k9, 0)  # pack of exchange_2
    box = yield "get", 2, None  # the message of the last step
    v813 = tuple(box); box.clear()
    yield "put", 2, (v812,)
    del v812
    v814 = f7(v811, v813, k9, 0)  # unpack of exchange_2

A `StepCode` is plain data and can be sent to another process. `passes/codegen.py` writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .step import Mode

SEGMENT = "<fxpass segment>"  #: the file name of a segment's source, in tracebacks
Act = Literal["put", "get", "keep"]
#: Yields (act, channel, what is put: of each exchange, by destination), is sent the receive buffers at a get, and
#: returns (outputs, new state). It empties the list of buffers, so that nobody keeps alive what it has used. Before the
#: closing message is put it yields ("keep", -1, (outputs, new state)), with None for outputs that it does not have yet:
#: after that message other ranks may write to the receive buffers of this step.
Run = Generator[tuple[Act, int, Any], Any, tuple[list[Tensor], list[Tensor]]]


class Form(NamedTuple):
    """What a segment is compiled for of an input."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(x: Tensor) -> Form:
        return Form(x.shape, x.stride(), x.dtype, x.device)

    def empty(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Segment:
    """What a step does between two puts or gets, in a form that equal ones share.

    Its source defines `segment(inputs)`, which returns a tuple of tensors and (of a pack) lists of tensors and None.
    """

    source: str
    objects: tuple[Any, ...]  #: the globals c0, c1, … of the source

    def function(self) -> Callable[[Sequence[Tensor]], tuple[Any, ...]]:
        namespace = {f"c{i}": value for i, value in enumerate(self.objects)}
        exec(compile(self.source, SEGMENT, "exec"), namespace)
        return namespace["segment"]


@dataclass(frozen=True)
class Place:
    """A call of a segment."""

    segment: str
    nodes: tuple[str, ...]  #: of each of the segment's operators: its name and module
    inputs: tuple[Any, ...]  #: (shape, dtype) of each input


@dataclass(frozen=True, eq=False)
class StepCode:
    """One rank's step of one mode. It is called with one value per placeholder of the graph."""

    rank: int
    mode: Mode
    placeholders: tuple[str, ...]
    source: str
    table: dict[str, Any]  #: the globals of the source: operators, exchanges, other static arguments
    lines: tuple[str, ...]  #: the node of each line of the source
    received: dict[str, int]  #: bytes that the rank receives, by role
    segments: dict[str, Segment]  #: by the name that the source calls it by
    places: dict[int, Place]  #: by the line that calls a segment

    def on(self, device: torch.device) -> StepCode:
        """The same code for another device of the kind that it was written for."""

        def moved(value: Any) -> Any:
            return device if isinstance(value, torch.device) and value.type == device.type else value

        table = {name: moved(value) for name, value in self.table.items()}
        segments = {
            name: Segment(segment.source, tuple(map(moved, segment.objects))) for name, segment in self.segments.items()
        }
        return replace(self, table=table, segments=segments)

    def run(self, values: Sequence[Tensor], compiled: Mapping[str, Callable[..., Any]] | None = None) -> Run:
        """Run on one value per placeholder.

        An operator's exception gets a note with the node, module and rank.

        Args:
            compiled: what the segments have become, by name.
        """
        try:
            return (yield from self._function(compiled or {}, values))
        except Exception as error:
            error.add_note(f"in fxpass rank {self.rank}, {self._where(error)}")
            raise

    @cached_property
    def _function(self) -> Callable[[Mapping[str, Callable[..., Any]], Sequence[Tensor]], Run]:
        filename = f"<fxpass rank {self.rank} {id(self):x}>"
        namespace = dict(self.table)
        exec(compile(self.source, filename, "exec"), namespace)
        return namespace["run"]

    def _where(self, error: Exception) -> str:
        code = self._function.__code__
        trace = error.__traceback__
        found, inside = "outside its graph", Place("", (), ())
        while trace is not None:
            if trace.tb_frame.f_code is code:
                found, inside = f"at {self.lines[trace.tb_lineno - 1]}", self.places.get(trace.tb_lineno, inside)
            elif trace.tb_frame.f_code.co_filename == SEGMENT and trace.tb_lineno - 3 < len(inside.nodes):
                return f"at {inside.nodes[trace.tb_lineno - 3]}"
            trace = trace.tb_next
        return found
