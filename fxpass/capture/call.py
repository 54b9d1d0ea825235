"""Flatten a call of a model into tensors, and give it the key by which its program is looked up."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..ir.layout import Layout
from .errors import CaptureError
from .objects import PLAIN, UNSEEN, all_seen, copied, holds_tensors, is_open, opened, parts_of, state_of, walk
from .unread import StandIn, Watch, may_be_unread


class _Unread:
    """Takes the place of a leaf's value in a key."""


@dataclass(frozen=True)
class Method:
    """A method of a model, which is captured in place of `model(*args, **kwargs)`.

    Attributes:
        name: the method's name.
        function: runs it; bound to the model.
        most: the most operators that may be recorded, else capture raises `TooManyOperatorsError`; None: no limit.
    """

    name: str
    function: Callable[..., Any]
    most: int | None = None


@dataclass(frozen=True)
class Call:
    """A call of a model or of one of its methods, with the arguments bound to their names and flattened.

    Numbers become 0-dim tensors, so that a timestep that changes at every step needs no new program. If the model does
    not accept a tensor there, the program guards the number.
    """

    tensors: tuple[Tensor, ...]
    paths: tuple[str, ...]  #: name of each tensor for the caller, e.g. "added_cond_kwargs.time_ids"
    numbers: dict[int, float]  #: index in `tensors` -> the Python number that the caller passed
    key: tuple[Any, ...]  #: hashable; calls with equal keys can share a program, apart from guards
    arguments: dict[str, Any]  #: the caller's own, by name
    unread: frozenset[int]  #: indices of leaves that the model seems not to read; `key` leaves them out
    _whole: tuple[Any, ...]  #: the key with all leaves
    _spec: pytree.TreeSpec
    _leaves: tuple[tuple[str, Any], ...]  #: path and value; the value of a tensor or number is `...`
    positional: tuple[str, ...]  #: see `bind`
    _alike: tuple[int, ...]  #: for each tensor, the first index of the same tensor
    method: Method | None = None  #: what is called; None: the model itself, with its hooks
    fed: tuple[str, ...] = ()  #: paths of tensors that another part of a pipeline makes anew for each step
    joined: bool = False  #: whether it calls several parts of a pipeline, each of which has its own arguments
    #: indices of tensors of which each rank has its rows, with their layouts
    given: tuple[tuple[int, Layout], ...] = ()

    @staticmethod
    def of(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], method: Method | None = None) -> Call:
        """Bind and flatten the arguments of a call of `model`, or of one of its methods.

        Raises:
            TypeError: the arguments do not fit the signature.
            CaptureError: an argument may hold tensors that cannot be found.
        """
        arguments, positional = bind(model.forward if method is None else method.function, args, kwargs)
        leaves, spec = pytree.tree_flatten_with_path(opened(arguments))
        tensors: list[Tensor] = []
        paths: list[str] = []
        numbers: dict[int, float] = {}
        for path, leaf in leaves:
            if _is_number(leaf):
                numbers[len(tensors)] = leaf
                leaf = torch.tensor(leaf, dtype=torch.int64 if isinstance(leaf, int) else torch.float64, device="cpu")
            if isinstance(leaf, Tensor):
                tensors.append(leaf)
                paths.append(_text(path))
        plain = tuple((_text(p), ... if isinstance(leaf, Tensor) or _is_number(leaf) else leaf) for p, leaf in leaves)
        kinds = tuple(_kind(_text(path), leaf) for path, leaf in leaves)
        first: dict[int, int] = {}
        alike = tuple(first.setdefault(id(tensor), i) for i, tensor in enumerate(tensors))  # `x is y` may be asked
        name = "" if method is None else method.name
        key = (spec, kinds, alike, autocast(), positional, name)  # hooks see what was passed by position
        none: frozenset[int] = frozenset()
        return Call(
            tuple(tensors), tuple(paths), numbers, key, arguments, none, key, spec, plain, positional, alike, method
        )

    def fed_with(self, indices: Sequence[int]) -> Call:
        """The same call with tensors of which it is known that they are made anew for each step."""
        if not indices:
            return self
        fed = tuple(self.paths[i] for i in indices)
        return replace(self, fed=fed, key=(*self.key, fed), _whole=(*self._whole, fed))

    def given_as(self, layouts: Mapping[int, Layout]) -> Call:
        """The same call with tensors of which each rank has its own rows."""
        if not layouts:
            return self
        given = tuple(layouts.items())
        return replace(self, given=given, key=(*self.key, given), _whole=(*self._whole, given))

    def apart(self) -> Call:
        """The same call with empty tensors in place of those of which each rank has its own rows."""
        if not self.given:
            return self
        given = dict(self.given)
        return replace(self, tensors=tuple(empty_like(x) if i in given else x for i, x in enumerate(self.tensors)))

    def without(self, unread: frozenset[int]) -> Call:
        """The same call with a key that leaves out these leaves."""
        spec, kinds, *rest = self._whole
        kinds = tuple((_Unread, kind[0]) if i in unread else kind for i, kind in enumerate(kinds))
        return replace(self, key=(spec, kinds, *rest), unread=unread)

    def differs(self, key: tuple[Any, ...]) -> frozenset[int]:
        """Indices of the leaves that differ between this call and one with `key`; empty if anything else differs."""
        (spec, kinds, *rest), (other_spec, others, *other_rest) = self._whole, key
        if spec != other_spec or rest != other_rest:
            return frozenset()
        found = [i for i, (kind, other) in enumerate(zip(kinds, others, strict=True)) if kind != other]
        alike = (others[i][1 if others[i][0] is _Unread else 0] is type(self._leaves[i][1]) for i in found)
        return frozenset(found) if all(alike) and all(may_be_unread(self._leaves[i][1]) for i in found) else frozenset()

    def seldom_read(self) -> frozenset[int]:
        """Indices of the leaves that models take and seldom read: generators of random numbers."""
        return frozenset(i for i, (_, leaf) in enumerate(self._leaves) if type(leaf) is torch.Generator)

    def modules(self) -> dict[int, tuple[str, str]]:
        """id of each tensor of the modules in the arguments -> ("foreign", its name for the caller)."""
        found: dict[int, tuple[str, str]] = {}
        for path, leaf in self._leaves:
            for module in (each for each in walk(leaf) if isinstance(each, nn.Module)):
                for name, tensor in chain(module.named_parameters(), module.named_buffers()):
                    found[id(tensor)] = ("foreign", f"{path}.{name}")
        return found

    def rebuild(self, tensors: Sequence[Any], watch: Watch | None = None) -> dict[str, Any]:
        """The arguments of the same call with other tensors; a tensor that is given twice is one tensor.

        Containers and objects are copies, because the model may write to them. With a `watch`, stand-ins take the place
        of leaves that are `unread`.
        """
        supply = iter([tensors[i] for i in self._alike])
        leaves = [next(supply) if leaf is ... else copied(leaf) for _, leaf in self._leaves]
        if watch is not None:
            leaves = [StandIn(watch) if i in self.unread else leaf for i, leaf in enumerate(leaves)]
        return pytree.tree_unflatten(leaves, self._spec)

    def run(self, model: nn.Module, arguments: dict[str, Any]) -> Any:
        """Call `model`, or its method, with what `rebuild` returned.

        Each argument is passed by position or by name, as the caller passed it.
        """
        args, named = passed(arguments, self.positional)
        return (model if self.method is None else self.method.function)(*args, **named)

    def refuse_gradients(self) -> None:
        """Raises `RuntimeError` if a tensor requires a gradient: no output will carry one."""
        path = next((path for path, tensor in zip(self.paths, self.tensors, strict=True) if tensor.requires_grad), None)
        if path is not None:
            raise RuntimeError(
                f"the input {path!r} requires a gradient, but a parallel module is for inference: its outputs carry no "
                "gradients; call it under torch.no_grad(), pass a detached tensor (.detach()), or use .unwrapped"
            )

    def generators(self) -> list[torch.Generator]:
        """Generators of random numbers among the arguments."""
        return [each for _, leaf in self._leaves for each in walk(leaf) if isinstance(each, torch.Generator)]

    def functions(self) -> list[Any]:
        """Functions, bound methods and partials among the arguments."""
        return [leaf for _, leaf in self._leaves if isinstance(leaf, (FunctionType, MethodType, functools.partial))]

    def with_numbers(self, tensors: Sequence[Any], lifted: frozenset[int] = frozenset()) -> list[Any]:
        """`tensors` with the caller's Python numbers in place of their tensors, except of the `lifted` ones."""
        return [tensor if i in lifted else self.numbers.get(i, tensor) for i, tensor in enumerate(tensors)]


def empty_like(tensor: Tensor) -> Tensor:
    """A tensor without elements, of the same dtype and device."""
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device)


def bind(
    function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The arguments by name, and the names of those that were passed by position, that of `*args` with its star.

    Raises:
        TypeError: they do not fit the signature.
    """
    signature = inspect.signature(function)
    bound = signature.bind(*args, **kwargs)
    parameters = signature.parameters
    rest = next((name for name, p in parameters.items() if p.kind is p.VAR_POSITIONAL), None)
    by_position = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    positional = by_position[: len(args)] + ([f"*{rest}"] if rest is not None and bound.arguments.get(rest) else [])
    arguments = {name: value for name, value in bound.arguments.items() if name != rest or value}
    for name, parameter in parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(name, {}))
    return arguments, tuple(positional)


def passed(arguments: dict[str, Any], positional: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments to pass by position, and those to pass by name, of what `bind` returned."""
    named, args = dict(arguments), []
    for name in positional:
        if name.startswith("*"):
            args.extend(named.pop(name[1:]))
        else:
            args.append(named.pop(name))
    return args, named


def _is_number(leaf: Any) -> bool:
    return (type(leaf) is int and abs(leaf) < 2**63) or type(leaf) is float


def autocast() -> tuple[Any, ...]:
    """The kinds of devices on which autocast is enabled, each with its dtype; empty if there are none."""
    kinds = [kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(kind)]
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind))


def _kind(path: str, leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return ("tensor", tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device)  # models may ask for strides
    if _is_number(leaf):
        return ("number", type(leaf))
    if isinstance(leaf, PLAIN):
        return (type(leaf), (leaf.start, leaf.stop, leaf.step) if isinstance(leaf, slice) else leaf)
    if isinstance(leaf, np.ndarray) or holds_tensors(leaf):
        if parts_of(leaf):
            raise CaptureError(
                f"the argument {path!r} is a {type(leaf).__name__} that holds tensors and refers to itself; remove the "
                "reference, or pass the tensors as arguments of their own"
            )
        raise CaptureError(
            f"the argument {path!r} is a {type(leaf).__name__}, whose tensors cannot be found; pass tensors, or keep "
            "them in lists, tuples, dicts, closures or the attributes of objects without __slots__ (other containers: "
            "torch.utils._pytree.register_pytree_node)"
        )
    if type(leaf) is torch.Generator:  # a model that draws from it has a `GeneratorStandIn` in its place
        return (type(leaf), weakref.ref(leaf), leaf.get_state().numpy().tobytes())
    state = state_of(leaf)
    if is_open(leaf) and vars(leaf) and all_seen(state):
        return (type(leaf), state)  # the model is given a copy, so that it cannot tell one from another
    try:
        hash(leaf)
    except TypeError:
        if state is UNSEEN:
            raise CaptureError(
                f"the argument {path!r} is a {type(leaf).__name__}, whose changes cannot be noticed; pass tensors, "
                "numbers, strings, or lists, tuples and dicts of them"
            ) from None
        return (type(leaf), state)
    try:
        return (type(leaf), weakref.ref(leaf), state)  # equal while both live and are equal; never a reused address
    except TypeError:
        return (type(leaf), leaf)


def _text(path: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)
