"""The drop-in module that `fxpass.parallelize` returns."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import MethodType, TracebackType
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from ...capture import Call, Method
from ...ir.advice import warn
from ..executor import Report
from .deferred import plain
from .engine import Engine
from .generation import Generation

if TYPE_CHECKING:
    from ...plan import Plan


class Watch(Protocol):
    """Announces the generations of a parallel module."""

    def __call__(self) -> None:
        """Called before each call."""
        ...

    def closed(self) -> None:
        """Called when the module was closed."""
        ...


_COMPILE = "torch.compile leaves a parallel module as it is; to compile it, call fxpass.parallelize(…, compile=True)"
OPERATORS = 6_000  #: most operators of a call of `decode` or `encode`; one that runs more of them runs unsplit
_SHARED = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


class ParallelModule(nn.Module):
    """A drop-in replacement for the user's model that runs each call on all ranks.

    It has the model's forward signature, attributes and methods (`config`, `dtype`, `add_adapter`, `cache_context`, …),
    and shares its dicts of parameters, buffers and submodules: `state_dict`, `named_parameters`, `to` and so on act
    on the model itself, under the same names. Setting an attribute sets it on the model. `isinstance` accepts both
    classes. The model is not patched; it can still be called directly. In a pipeline the model itself is attached
    (`attached.py`): then its calls run on the ranks, and this object is the handle for the rest.

    It is for inference: outputs carry no gradient, also outside `torch.no_grad()`. Weights may require gradients; an
    input that requires one in a call with gradients enabled is an error.
    """

    _model: nn.Module
    _engine: Engine
    _methods: tuple[str, ...]  #: names of the methods that run on all ranks
    _required: bool
    _attached: dict[str, tuple[MethodType, Any]]  #: of an attached model: by name, method and what it replaced
    _watches: list[Watch]  #: what announces generations
    _said_copied: bool

    def __init__(self, model: nn.Module, engine: Engine, methods: Sequence[str] = (), *, required: bool = True) -> None:
        """
        Args:
            methods: names of the methods beside `forward` that run on all ranks (`decode`, `encode`). A call of one
                that cannot be split runs unsplit.
            required: whether a call of `forward` that cannot be split is an error; else it runs unsplit, too.
        """
        super().__init__()
        state = self.__dict__
        state["_model"] = model
        state["_methods"] = ("forward", *methods)
        state["_required"] = required
        state["_attached"] = {}
        state["_watches"] = []
        state["_said_copied"] = False
        state["__module__"] = type(model).__module__  # libraries that save a model read where its class is defined
        for name in _SHARED:
            state[name] = vars(model)[name]
        self._run_on(engine)

    def _run_on(self, engine: Engine) -> None:
        """Use another engine from now on, in place of the present one, which is closed."""
        state = self.__dict__
        if "_engine" in state:
            self._engine.close("fxpass.parallelize was called again")
        state["_engine"] = engine
        engine.before_call = self._watches
        if not self._attached:
            self._own_methods()

    def _own_methods(self) -> None:
        """Run the methods of a model that is not attached."""
        for name in self._methods:
            self.__dict__[name] = _split(self._model, self._engine, name)

    def _most(self, name: str) -> int | None:
        """The most operators of a call of a method, beyond which it runs unsplit; None: it is split or refused."""
        return None if name == "forward" and self._required else OPERATORS

    @property
    def plan(self) -> Plan | None:
        """The plan of the latest call; None before the first."""
        return cast("Plan | None", self._engine.plan)

    @property
    def unwrapped(self) -> nn.Module:
        """The user's model."""
        return self._model

    @property
    def traffic(self) -> Mapping[str, int]:
        """Bytes that this process has received so far, by the role of the exchange."""
        return dict(self._engine.executor.traffic)

    @property
    def compile_reports(self) -> list[Report]:
        """With `compile=True`: how long compilation took on this process's rank, and whether it was a cache hit."""
        return self._engine.compiled

    def reset(self, timesteps: Sequence[float] | Tensor = ()) -> None:
        """Begin a generation in this thread: its first step is exact, and no earlier state is read.

        Args:
            timesteps: the timesteps of the generation, as in `scheduler.timesteps`. Without them the strategy's
                `cooldown_steps` have no effect. A pipeline given to `parallelize` passes them automatically.
        """
        self._engine.reset([float(each) for each in timesteps])

    def generation(self, timesteps: Sequence[float] | Tensor = ()) -> Generation:
        """A denoising loop: calls within its `with` block read the state of no other calls.

            with module.generation(scheduler.timesteps):
                for t in scheduler.timesteps:
                    sample = scheduler.step(module(sample, t, prompt), t, sample).prev_sample

        It can be entered again, so that several loops can take turns. A pipeline given to `parallelize` begins a
        generation at each call by itself.

        Args:
            timesteps: as for `reset`.
        """
        return self._engine.generation([float(each) for each in timesteps])

    def warmup(self, *args: Any, **kwargs: Any) -> None:
        """Do beforehand what the first calls with inputs like these would do: capture, plan, load, compile.

        It runs the model as often as it takes to meet each kind of step, with falling timesteps, and leaves no state
        behind. (A `decode` or `encode` is prepared by calling it once. A denoiser that takes what another part of its
        pipeline returns is prepared by a call of the pipeline.)

        Args:
            args, kwargs: example inputs of a call.
        """
        args, kwargs = plain((args, kwargs))
        with self.generation():
            self(*args, **kwargs)
            self._engine.complete()
            for number in range(1, self._engine.kinds):
                self._engine.later(Call.of(self._model, args, kwargs), number)(self)
                self._engine.complete()

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Warn, and change nothing: `fxpass.parallelize(…, compile=True)` is what compiles the ranks' programs."""
        _warn_of_compile()

    def close(self) -> None:
        """End the worker processes, if there are any. Later calls raise `RuntimeError`.

        After `fxpass.parallelize` it can be called again; `fxpass.restore` gives the model back.
        """
        self._engine.close()
        for watch in list(self._watches):
            watch.closed()

    def __enter__(self) -> ParallelModule:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._engine.give_up(f"the block of the parallel module was left with {type(error).__name__}")
        self.close()

    # -- everything else is forwarded to the model ----------------------------------------------------------

    @property
    def __class__(self) -> type:
        return type(self.__dict__["_model"]) if "_model" in self.__dict__ else ParallelModule

    @property
    def training(self) -> bool:
        return self._model.training if "_model" in self.__dict__ else False

    @training.setter
    def training(self, mode: bool) -> None:
        if "_model" in self.__dict__:
            self._model.training = mode

    def __getattr__(self, name: str) -> Any:
        if "_model" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["_model"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if "_model" not in self.__dict__ or name in self.__dict__:
            super().__setattr__(name, value)
        else:
            setattr(self._model, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._model, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._model)})

    def __repr__(self) -> str:
        return f"Parallel({self._model!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a parallel module cannot be copied or pickled; copy or save its .unwrapped model")


def _split(model: nn.Module, engine: Engine, name: str) -> Callable[..., Any]:
    """A function that runs a method on all ranks, with its signature.

    It does not refer to the wrapper: no reference cycle.
    """

    outside_dynamo = graph_break()

    def split(*args: Any, **kwargs: Any) -> Any:
        method = None if name == "forward" else Method(name, getattr(model, name), OPERATORS)
        if torch.compiler.is_dynamo_compiling():
            return outside_dynamo(engine, args, kwargs, method)
        return engine(args, kwargs, method)

    split.__name__ = name
    split.__signature__ = inspect.signature(getattr(model, name))
    split.__doc__ = getattr(model, name).__doc__
    return split


@cache
def graph_break() -> Callable[..., Any]:
    """A function that runs a call which comes from code compiled by torch.compile, as a graph break.

    Made when a model is wrapped: Dynamo takes as long to import as torch, and worker processes need none.
    """

    def run(engine: Engine, args: tuple[Any, ...], kwargs: dict[str, Any], method: Method | None) -> Any:
        _warn_of_compile()
        return engine(args, kwargs, method)

    return torch.compiler.disable(run, reason=_COMPILE)


@cache
def _warn_of_compile() -> None:
    """Warn once per process."""
    warn(_COMPILE)


def _acting_on_the_model(name: str) -> Callable[..., Any]:
    def method(self: ParallelModule, *args: Any, **kwargs: Any) -> Any:
        result = getattr(self._model, name)(*args, **kwargs)
        return self if result is self._model else result

    method.__name__ = name
    method.__doc__ = getattr(nn.Module, name).__doc__
    return method


# Methods that nn.Module defines, so `__getattr__` never forwards them, and that a model may have overridden.
for _name in (
    *("to", "cuda", "cpu", "half", "float", "double", "bfloat16", "type", "to_empty", "_apply", "apply"),
    *("train", "eval", "requires_grad_", "zero_grad", "share_memory"),
    *("state_dict", "load_state_dict", "get_extra_state", "set_extra_state", "extra_repr"),
    *("add_module", "register_module", "register_parameter", "register_buffer"),
):
    setattr(ParallelModule, _name, _acting_on_the_model(_name))
