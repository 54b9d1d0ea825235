"""Find the Python modules that register operators, and import them in worker processes.

A worker is sent operators by name. Those of torch and fxpass are there; others come with a module of the user's or with
a library that was loaded. The user's script (`__main__`) is never run again, so operators that it registers itself
cannot be had in a worker.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable, Iterator
from importlib import import_module
from types import FunctionType
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch._ops import OpOverload


def origins(operator: OpOverload) -> list[str]:
    """The imported Python modules that define an operator or register a kernel for it, the definition first."""
    modules = [each.__module__ for each in _functions(operator)]
    by_file = {getattr(module, "__file__", None): name for name, module in list(sys.modules.items())[::-1]}
    files = re.findall(r"registered at (.+?\.py):\d+", torch._C._dispatch_dump(operator.name()))
    modules += [by_file[file] for file in files if file in by_file]
    return [module for module in dict.fromkeys(modules) if module.partition(".")[0] not in ("torch", "fxpass")]


def refuse_script(operators: Iterable[OpOverload]) -> None:
    """Raises `NotImplementedError` if the script that runs registers one of the operators."""
    for operator in operators:
        if "__main__" in origins(operator):
            raise NotImplementedError(
                f"{operator.name()} is registered by the script itself, which worker processes do not run again; "
                "register it in a module that the script imports, or start the script with torchrun "
                "(executor='distributed')"
            )


def reference(operator: OpOverload) -> tuple[str, list[str], list[str]]:
    """What `resolve` needs to find an operator in another process."""
    found = origins(operator)
    return str(operator), [*found, *_namesakes(operator.namespace, found)], sorted(torch.ops.loaded_libraries)


def _namesakes(namespace: str, known: Collection[str]) -> list[str]:
    """Imported modules that are called as the namespace of an operator is: extensions tend to call both alike.

    Args:
        known: modules that register the operator. Without any (torch forgets where `torch.library.define` was called),
            modules within packages count as well.
    """
    if namespace in sys.modules:
        return [namespace]
    inner = [] if known else [name for name in list(sys.modules) if name.rpartition(".")[2] == namespace]
    return sorted(name for name in inner if name.partition(".")[0] not in ("torch", "fxpass"))


def resolve(name: str, modules: list[str], libraries: list[str]) -> Any:
    """The operator in this process; imports the modules that register it, and loads libraries if it is still missing.

    Raises:
        RuntimeError: it cannot be had; an error in one of the modules is the cause.
    """
    try:
        for module in modules:
            import_module(module)
        if not _registered(name):
            for library in libraries:
                torch.ops.load_library(library)
        if _registered(name):
            return _found(name)
    except Exception as error:
        raise RuntimeError(f"a worker process cannot import what registers the operator {name}: {error}") from error
    known = f"after importing {', '.join(modules)}" if modules else "and no Python module is known to register it"
    raise RuntimeError(
        f"a worker process does not know the operator {name} {known}; register it when a module that is not the script "
        "itself is imported (torch.library.custom_op), or start the script with torchrun (executor='distributed')"
    )


def _registered(name: str) -> bool:
    try:
        return _found(name) is not None
    except AttributeError:
        return False


def _found(name: str) -> Any:
    found: Any = torch.ops
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _functions(operator: OpOverload) -> Iterator[FunctionType]:
    """The user's functions that `torch.library.custom_op` made the operator of."""
    definition = OPDEFS.get(operator._schema.name)
    if definition is not None:
        yield definition._init_fn
        for kernel in definition._backend_fns.values():
            yield from _wrapped(kernel)


def _wrapped(function: Any) -> Iterator[FunctionType]:
    """A function and those that its closure holds: torch wraps kernels so."""
    if isinstance(function, FunctionType):
        yield function
        for cell in function.__closure__ or ():
            yield from _wrapped(cell.cell_contents)
