"""A call of a model as flat tensors: what a program is captured for and what it is looked up by."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Call:
    """`model(*args, **kwargs)`, its arguments bound to the names of `forward` and flattened."""

    tensors: tuple[Tensor, ...]
    paths: tuple[str, ...]  #: what the caller calls each tensor, e.g. "added_cond_kwargs.time_ids"
    key: tuple[Any, ...]  #: hashable; equal for calls that one program can serve, guards aside
    _spec: pytree.TreeSpec
    _leaves: tuple[Any, ...]
    _positional: tuple[str, ...]

    @staticmethod
    def of(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Call:
        """Raises `TypeError` as `model.forward` would if the arguments do not fit it."""
        signature = inspect.signature(model.forward)
        bound = signature.bind(*args, **kwargs)
        positional = tuple(
            name
            for name, p in signature.parameters.items()
            if p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL) and name in bound.arguments
        )
        if any(p.kind is p.VAR_POSITIONAL and bound.arguments.get(n) for n, p in signature.parameters.items()):
            # names before *args must stay positional too
            names = list(bound.arguments)
            last = next(n for n, p in signature.parameters.items() if p.kind is p.VAR_POSITIONAL)
            positional = tuple(names[: names.index(last) + 1])
        arguments = dict(bound.arguments)
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD and name in arguments:
                arguments.update(arguments.pop(name))
        leaves, spec = pytree.tree_flatten_with_path(arguments)
        tensors = tuple(leaf for _, leaf in leaves if isinstance(leaf, Tensor))
        paths = tuple(_text(path) for path, leaf in leaves if isinstance(leaf, Tensor))
        plain = tuple(... if isinstance(leaf, Tensor) else leaf for _, leaf in leaves)
        kinds = tuple(_kind(leaf) for _, leaf in leaves)
        return Call(tensors, paths, (spec, kinds, torch.is_autocast_enabled()), spec, plain, positional)

    def rebuild(self, tensors: Sequence[Tensor]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of the same call with other tensors."""
        supply = iter(tensors)
        arguments = pytree.tree_unflatten([next(supply) if v is ... else v for v in self._leaves], self._spec)
        args: list[Any] = []
        for name in self._positional:
            value = arguments.pop(name)
            args.extend(value) if isinstance(value, tuple) and name == self._positional[-1] else args.append(value)
        return args, arguments


def flatten_output(value: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """`tree_flatten` that also enters dataclasses nobody registered."""

    def register(leaf: Any) -> Any:
        kind = type(leaf)
        if dataclasses.is_dataclass(kind) and kind not in pytree.SUPPORTED_NODES:
            pytree.register_dataclass(kind)
            pytree.tree_map(register, leaf)
        return leaf

    pytree.tree_map(register, value)
    return pytree.tree_flatten(value)


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return ("tensor", tuple(leaf.shape), leaf.dtype, leaf.device)
    try:
        hash(leaf)
    except TypeError:
        return (type(leaf), id(leaf))
    return (type(leaf), leaf)


def _text(path: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)
