"""Parts of a pipeline that run on rank 0 alone, under torchrun: the other ranks get what they return.

The modules stay the user's objects. `forward` of a part and of each module in it (pipelines also call these), and other
methods of the part, are set in their `__dict__`, as `attached.py` does for what runs on all ranks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from threading import get_ident
from types import MethodType
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ..distributed import DistributedExecutor
from ..executor import device_of
from .attached import leads_to
from .deferred import plain
from .engine import leaves_of
from .turn import Turn

#: by the id of the user's module, which they keep alive
_parts: WeakValueDictionary[int, FirstRankPart] = WeakValueDictionary()


class FirstRankPart:
    """A part of a pipeline that runs on rank 0.

    Args:
        name: what the pipeline calls it.
        methods: those besides `forward` that pipelines call.
        executor: closed with the part.
        turn: of all parts whose executors share processes.
    """

    def __init__(
        self, model: nn.Module, name: str, methods: Sequence[str], executor: DistributedExecutor, turn: Turn
    ) -> None:
        self.model = model
        self._name = name
        self._executor = executor
        self._turn = turn
        #: what is attached: the module, the name of the method, the method, what it replaced, and what it is called
        self._attached: list[tuple[nn.Module, str, MethodType, Any, str]] = []
        self._placeholders: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []
        if (other := _parts.get(id(model))) is not None and other.model is model:
            other.detach()
        _parts[id(model)] = self
        if not executor.first:
            self._replace_meta()
        for path, module in model.named_modules():
            if type(module).forward is not nn.Module.forward:
                self._put(module, "forward", f"{name}.{path}".removesuffix("."))
        for method in methods:
            self._put(model, method, f"{name}.{method}")

    def detach(self) -> None:
        """Put back what was there before."""
        for module, name, method, before, _ in self._attached:
            if vars(module).get(name) is method:
                del vars(module)[name]
                if before is not None:
                    vars(module)[name] = before
        self._attached.clear()
        for table, key, meta, placeholder in self._placeholders:
            if table.get(key) is placeholder:
                table[key] = meta
        self._placeholders.clear()
        if _parts.get(id(self.model)) is self:
            del _parts[id(self.model)]
        self._executor.close()

    def attach_again(self) -> None:
        """Attach methods that were replaced since, as hooks for offloading do when they are set again."""
        for entry in [each for each in self._attached if not leads_to(*each[:3])]:
            self._attached.remove(entry)
            module, name, _, _, what = entry
            self._put(module, name, what)

    def _replace_meta(self) -> None:
        """Give weights without values a device, which pipelines look at: one number (NaN), as large as they are."""
        for module in self.model.modules():
            tables: Any = (module._parameters, module._buffers)
            for table in tables:
                for key, tensor in table.items():
                    if tensor is None or tensor.device.type != "meta":
                        continue
                    value = float("nan") if tensor.is_floating_point() or tensor.is_complex() else 0
                    new = torch.full((), value, dtype=tensor.dtype).expand(tensor.shape)
                    new = nn.Parameter(new, requires_grad=False) if isinstance(tensor, nn.Parameter) else new
                    self._placeholders.append((table, key, tensor, new))
                    table[key] = new

    def _put(self, module: nn.Module, name: str, what: str) -> None:
        before = vars(module).get(name)
        original = getattr(type(module), name).__get__(module) if before is None else before

        def call(this: Any, /, *args: Any, **kwargs: Any) -> Any:
            if this is not module:  # a copy
                return getattr(type(this), name)(this, *args, **kwargs)
            if not self._attached or self._turn.holder == get_ident():
                return original(*args, **kwargs)
            return self._call(what, original, args, kwargs)

        signature = inspect.signature(original)
        this = inspect.Parameter("_self", inspect.Parameter.POSITIONAL_ONLY)
        call.__signature__ = signature.replace(parameters=[this, *signature.parameters.values()])
        call.__name__, call.__doc__ = name, original.__doc__
        method = MethodType(call, module)
        self._attached.append((module, name, method, before, what))
        vars(module)[name] = method

    def _call(self, what: str, original: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        args, kwargs = plain((args, kwargs))
        arguments = {f"argument {i}": value for i, value in enumerate(args, 1)} | kwargs
        generators = _generators(args, kwargs)

        def compute() -> Any:
            before = {name: each.get_state() for name, each in generators.items()}
            value = original(*args, **kwargs)
            after = {name: each.get_state() for name, each in generators.items()}
            return value, {name: state for name, state in after.items() if not torch.equal(state, before[name])}

        with self._turn.taken(), torch.no_grad():
            try:
                value, states = self._executor.on_first(what, arguments, compute, self._device(args, kwargs))
                for name, state in states.items():  # later calls draw the same numbers on all ranks
                    if name in generators:
                        generators[name].set_state(state)
                return value
            except BaseException as error:
                self._executor.failed(error)
                raise

    def _device(self, *arguments: Any) -> torch.device:
        """Where this rank takes tensors that rank 0 has on a GPU: beside its arguments, else on its own GPU."""
        found = device_of([each for each in leaves_of(*arguments) if isinstance(each, Tensor)])
        if found.type != "cpu" or not torch.cuda.is_available():
            return found
        return torch.device("cuda", torch.cuda.current_device())


def _generators(*arguments: Any) -> dict[str, torch.Generator]:
    """What a part may draw random numbers from: torch's own generators, and those among its arguments."""
    found = {"cpu": torch.default_generator}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.default_generators[torch.cuda.current_device()]
    given = [leaf for leaf in leaves_of(*arguments) if isinstance(leaf, torch.Generator)]
    return found | {f"argument {i}": each for i, each in enumerate(given)}
