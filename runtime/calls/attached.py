"""Split the user's own module in place: methods of the instance that run on all ranks.

`attach` sets `forward` (and `decode`, `encode`) in the module's `__dict__`, so the object, its class and everything
else about it stay what they are. What was there before, or the method of the class, is the *original*: it is what
capture runs, and it runs if the module is called within one of its own calls, and in copies of the module.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from threading import get_ident
from types import CodeType, MethodType
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from ...capture import Method
from ...capture.executed import transparent
from ...capture.objects import walk
from ...ir.advice import warn
from .module import ParallelModule, graph_break

#: modules that are attached, by the id of the user's model, which they keep alive
_attached: WeakValueDictionary[int, ParallelModule] = WeakValueDictionary()
UNKNOWN = object()  #: what a method replaces, before anybody has looked
_codes: set[CodeType] = set()  #: of the methods that `attach` sets


def attached_to(model: nn.Module) -> ParallelModule | None:
    """The parallel module that runs the calls of `model`; None if there is none."""
    found = _attached.get(id(model))
    return found if found is not None and found.unwrapped is model else None


def attach(module: ParallelModule) -> None:
    """Let calls of the user's model run on all ranks."""
    _attached[id(module.unwrapped)] = module
    for name in module._methods:
        _put(module, name)


def detach(module: ParallelModule) -> None:
    """Put back what was there before. Where something else has wrapped a method, the original runs in it."""
    model = module.unwrapped
    for name, (method, before) in module._attached.items():
        if vars(model).get(name) is method:
            del vars(model)[name]
            if before is not None:
                vars(model)[name] = before
    module._attached.clear()
    module._own_methods()
    _attached.pop(id(model), None)


def attach_again(module: ParallelModule) -> None:
    """Attach methods that were replaced since, as hooks for offloading do when they are set again."""
    for name, (method, _) in list(module._attached.items()):
        if not leads_to(module.unwrapped, name, method):
            _put(module, name)


@contextmanager
def attached_for_now(modules: Collection[ParallelModule]) -> Iterator[None]:
    """Let calls of these models run on all ranks within the context.

    The methods are the same objects each time: programs that were captured with them stay valid.
    """
    for module in modules:
        model = vars(module.unwrapped)
        for name in module._methods:
            _, before = module._attached.get(name, (None, UNKNOWN))
            if model.get(name) is not before:
                module._attached[name] = (_split(module, module.unwrapped, name, model.get(name)), model.get(name))
            model[name] = module._attached[name][0]
    try:
        yield
    finally:
        for module in modules:
            for name, (_, before) in module._attached.items():
                del vars(module.unwrapped)[name]
                if before is not None:
                    vars(module.unwrapped)[name] = before


def _put(module: ParallelModule, name: str) -> None:
    model = module.unwrapped
    before = vars(model).get(name)
    if isinstance(before, MethodType) and before.__func__.__code__ in _codes:
        before = None  # the model is a copy of an attached one
    method = _split(module, model, name, before)
    module._attached[name] = (method, before)
    vars(model)[name] = vars(module)[name] = method


def leads_to(model: nn.Module, name: str, method: MethodType) -> bool:
    """Whether a method is in place, alone or within what wraps it."""
    if vars(model).get(name) is method:
        return True
    # hooks keep what they wrap in their closure, or as another attribute of the module
    around = [value for value in vars(model).values() if callable(value)]
    return name in vars(model) and any(each is method for each in walk(around))


def _split(parallel: ParallelModule, model: nn.Module, name: str, before: Any) -> MethodType:
    """A method that runs on all ranks.

    It is bound, so that a deep copy of the model has one that is bound to the copy.
    """

    outside_dynamo = graph_break()

    @transparent
    def split(module: Any, /, *args: Any, **kwargs: Any) -> Any:
        if module is not model:
            return _in_a_copy(parallel, module, name, args, kwargs)
        original = getattr(type(model), name).__get__(model) if before is None else before
        engine = parallel._engine
        if name not in parallel._attached or engine.turn.holder == get_ident():
            return original(*args, **kwargs)
        method = Method(name, original, parallel._most(name))
        if torch.compiler.is_dynamo_compiling():
            return outside_dynamo(engine, args, kwargs, method)
        return engine(args, kwargs, method)

    _codes.add(split.__code__)
    original: Any = getattr(type(model), name).__get__(model) if before is None else before
    signature = inspect.signature(original)
    this = inspect.Parameter("_self", inspect.Parameter.POSITIONAL_ONLY)
    split.__signature__ = signature.replace(parameters=[this, *signature.parameters.values()])
    split.__name__ = name
    split.__doc__ = original.__doc__
    return MethodType(split, model)


def _in_a_copy(parallel: ParallelModule, module: nn.Module, name: str, args: Any, kwargs: Any) -> Any:
    """Run the method of the class in a copy of the user's model."""
    if not parallel._said_copied:
        parallel._said_copied = True
        warn(
            f"this {type(module).__name__} is a copy of a parallel one, and runs unsplit; to split it, call "
            "fxpass.parallelize on the copy"
        )
    return getattr(type(module), name)(module, *args, **kwargs)
