"""Find the classes of diffusers that a case needs, and the one that it stands for.

An older diffusers lacks the newer classes. Cases name them inside functions only, so that nothing is looked up before
a model is built; the names are read from the functions' bytecode.
"""

from __future__ import annotations

import dis
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import diffusers
from torch import nn

from ..case import Case


def available(case: Case) -> bool:
    """Whether the installed diffusers has every class that `case.model` names."""
    needed = {name for one in _functions(case.model) for name in _attributes(one.__code__, "diffusers")}
    return needed <= _exported()


def sources_of(case: Case) -> frozenset[Path]:
    """The files of this package that define a case."""
    makers = (case.model, case.extra, case.maker)
    return frozenset(Path(one.__code__.co_filename) for maker in makers for one in _functions(maker))


def kind_of(case: Case, module: nn.Module) -> tuple[str, str]:
    """The class that a case stands for, and the folder of diffusers that has it (or "" if none has)."""
    inner = getattr(module, "vae", module)
    kind = type(inner) if not case.covers else getattr(diffusers, case.covers, None)
    path = "" if kind is None else kind.__module__
    return case.covers or type(inner).__name__, path.split(".")[2] if path.startswith("diffusers.models.") else ""


@cache
def _exported() -> frozenset[str]:
    return frozenset(dir(diffusers))


def _functions(function: Any) -> Iterator[FunctionType]:
    """A function, and all functions of this package that it calls by name or refers to."""
    seen: set[int] = set()
    waiting: list[Any] = [function]
    while waiting:
        one = waiting.pop()
        if isinstance(one, partial):
            waiting += [one.func, *one.args, *one.keywords.values()]
        elif isinstance(one, FunctionType) and _is_ours(one) and id(one) not in seen:
            seen.add(id(one))
            yield one
            waiting += [one.__globals__.get(name) for code in _codes(one.__code__) for name in code.co_names]
            waiting += [cell.cell_contents for cell in one.__closure__ or ()]


def _is_ours(function: FunctionType) -> bool:
    return not function.__module__.startswith(("diffusers.", "torch."))


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code, and that of the functions within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _attributes(code: CodeType, module: str) -> Iterator[str]:
    """The names X of all `module.X`."""
    for each in _codes(code):
        before: Any = None
        for instruction in dis.get_instructions(each):
            if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and before == ("LOAD_GLOBAL", module):
                yield instruction.argval
            before = instruction.opname, instruction.argval
