"""The programs of a model: captured once per kind of call, planned, loaded, and forgotten when the model changes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...capture import (
    Call,
    CaptureError,
    TooManyOperatorsError,
    broken_guard,
    capture_call,
    guard_error,
    outdated,
)
from ...capture.structure import Structure, WeightTable
from ...capture.unread import Unread
from ...ir.advice import warn
from ...ir.garbage import collection_paused
from ...ir.program import Program
from ..executor import Executor, PlanLike
from .clock import Clock
from .deferred import plain
from .entry import Entry

SIGNATURES = 8  #: programs kept; the least recently used one is evicted first
GUARDED = 4  #: programs kept of one signature that differ only in guarded values; more captures in a row are an error

Planner = Callable[[Program], PlanLike]


class NoPlanError(ValueError):
    """No plan can be used for a call. The message says why."""


class Programs:
    """The programs of `model` and of its methods, by the kind of call.

    Args:
        releasing: called with an entry before it is released.
        capturing: given the model, what it is captured in: a context that changes options of it, and back.
    """

    def __init__(
        self,
        model: nn.Module,
        planner: Planner,
        executor: Executor,
        releasing: Callable[[Entry], None] = lambda entry: None,
        capturing: Callable[[nn.Module], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.changes = 0  #: how often the model was changed so that its programs were forgotten
        self._model = model
        self._planner = planner
        self._executor = executor
        self._releasing = releasing
        self._capturing = capturing
        self._entries: OrderedDict[Any, list[Entry]] = OrderedDict()
        self._structure: Structure | None = None
        self._unread = Unread()
        self._evicted: set[int] = set()  # hashes of the keys whose programs were evicted
        self._hinted = False  # whether the warning about evictions was given
        self.in_a_row = 0  #: captures since the last call that reused a program

    def __len__(self) -> int:
        return sum(map(len, self._entries.values()))

    def all(self) -> list[Entry]:
        """All entries, also those for one call of plans that run several."""
        found = [entry for entries in self._entries.values() for entry in entries]
        return found + [entry.alone for entry in found if entry.alone not in (None, entry)]

    def update(self) -> None:
        """Forget all programs if the structure of the model has changed since they were captured."""
        if self._structure is None or self._structure.untouched():
            return
        if not self._structure.refresh():
            self.changes += 1
            self.forget()
        for entry in self.all():
            entry.look_up(self._model)

    def entry(self, call: Call, *, planned: bool = True, whole: bool = False) -> Entry:
        """The program for a call, captured if there is none.

        Args:
            planned: whether a new one is planned and loaded at once.
            whole: it is known that the model reads all arguments.
        """
        if hash(call.key) in self._evicted and not self._hinted:
            self._hinted = True
            warn(
                f"{type(self._model).__name__} is captured again for a kind of call that it was captured for before: "
                f"only the programs of the {SIGNATURES} latest kinds (shapes, options) are kept; make all calls of one "
                "kind before those of the next, or bring the inputs to fewer shapes"
            )
        call = call if whole else self._unread.reduced(call, self._entries)
        entries = self._entries.setdefault(call.key, [])
        self._entries.move_to_end(call.key)
        for entry in [entry for entry in entries if outdated(entry.captured, self._model)]:
            entries.remove(entry)
            self._release(entry)
        broken = None
        for entry in entries:
            broken = broken_guard(entry.captured, self._model, call.tensors)
            if broken is None:
                entries.remove(entry)
                entries.append(entry)  # ordered from least to most recently used
                self.in_a_row = 0
                return entry
        if broken is not None and len(entries) >= GUARDED:
            if self.in_a_row >= GUARDED:
                raise guard_error(broken)
            self._release(entries.pop(0))
        self.in_a_row += 1
        try:
            return self._capture(call, entries, planned)
        except CaptureError as error:
            if not call.unread or isinstance(error, TooManyOperatorsError):
                raise
            if call.unread == call.seldom_read():  # read in this call: with other numbers it may not be
                self.in_a_row -= 1
                return self.entry(call.without(frozenset()), planned=planned, whole=True)
            while entries:
                self._release(entries.pop())
            return self.entry(self._unread.refute(call), planned=planned)
        finally:
            if entries:
                self._entries[call.key] = entries
            else:
                self._entries.pop(call.key, None)

    @collection_paused()
    def _capture(self, call: Call, entries: list[Entry], planned: bool) -> Entry:
        with torch.inference_mode(False), self._capturing(self._model):
            program = capture_call(self._model, replace(call, tensors=plain(call.tensors)))
        plan = self._planner(program) if planned else None
        while len(self) >= SIGNATURES:
            self._evict()
        entry = Entry(program, hooks=call.method is None)
        entry.look_up(self._model)
        if plan is not None:
            self.load(entry, plan, call)
        entries.append(entry)
        known = [*self.all(), entry]
        changes = [change for each in known for change in each.captured.changes]
        self._structure = Structure(self._model, changes, hooks=any(each.hooks for each in known))
        return entry

    def load(self, entry: Entry, plan: PlanLike, call: Call) -> None:
        """Let an entry run by a plan.

        Args:
            call: one of its calls.
        """
        table = WeightTable(self._model, list(plan.program.weights.values()))
        inputs = call.apart().tensors
        if plan.calls > 1:
            inputs = [torch.stack([x] * plan.calls) for x in inputs]
        entry.loaded = self._executor.load(plan, table.tensors(), inputs)
        exact = plan.exact_steps
        entry.clock = None if exact is None else Clock.of(plan.program, *exact)
        entry.plan, entry.weights, entry.planned = plan, table, True
        if entry.clock is not None and entry.clock.timestep is None:
            names = ", ".join(plan.program.input_paths)
            warn(
                f"{type(self._model).__name__} has no input that is known to be a timestep (its inputs: {names}), so "
                "its steps cannot be told apart: all of them are exact"
            )

    def _release(self, entry: Entry) -> None:
        self._releasing(entry)
        for each in (entry, entry.alone if entry.alone is not entry else None):
            if each is not None and each.planned:
                each.loaded.release()

    def _evict(self) -> None:
        key = next(key for key, entries in self._entries.items() if entries)
        self._release(self._entries[key].pop(0))
        if not self._entries[key]:
            del self._entries[key]
            self._evicted.add(hash(key))

    def forget(self) -> None:
        """Release all programs."""
        for entries in self._entries.values():
            for entry in entries:
                self._release(entry)
        self.clear()
        self._evicted.clear()
        self._structure = None

    def clear(self) -> None:
        """Drop all programs, released or not."""
        self._entries.clear()
