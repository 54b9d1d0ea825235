"""Repeat a model's changes to its arguments: filled caches, counters in dicts, tensors written in place.

A recorded run gets copies of all containers. Its insertions and removals are repeated on the caller's containers after
each call. A tensor that it writes in place is an output of the program, and is copied back.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from types import CellType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..ir.program import Change, Given, Program
from .call import Call
from .errors import CaptureError
from .objects import PLAIN, copied, flatten, is_open, parts_of, state_of
from .reach import left_by, table_of, tensors_in
from .sharing import sharing
from .survivors import mark_left_behind

_GONE = object()


class Arguments:
    """Copies of the arguments for one run, compared after the run with their contents before it."""

    def __init__(self, call: Call, copies: dict[str, Any]) -> None:
        self._given = dict(_places(call.arguments))
        self._copies = dict(_places(copies))
        self._before = {place: _inside(value) for place, value in self._copies.items()}
        self._states = {
            place: state_of(value)
            for place, value in self._copies.items()
            if not self._before[place] and not isinstance(value, (Tensor, nn.Module, *PLAIN))
        }
        self._owned: dict[int, Given] = {}
        for place, value in self._copies.items():
            if isinstance(value, Tensor) or _table(value) is not None:
                self._owned.setdefault(id(value), Given(place))

    def changes(self) -> tuple[list[Change], list[dict[Any, Any]]]:
        """What the model removed from each container, and what it inserted.

        Raises `CaptureError` for a change that cannot be repeated.
        """
        changes: list[Change] = []
        entries: list[dict[Any, Any]] = []
        for place, value in self._copies.items():
            before, after = self._before[place], _inside(value)
            new = {key: item for key, item in after.items() if not _same(item, before.get(key, _GONE))}
            gone = tuple(key for key in before if key not in after)
            silent = place in self._states and not after and state_of(value) != self._states[place]
            if not (new or gone or silent):
                continue
            path = ".".join(map(str, (*place, *list(new)[:1])))
            if silent or _table(value) is None or value is self._given.get(place):
                raise CaptureError(
                    f"the model writes to its arguments: {path} is new or another after the call, and nothing shows "
                    f"how to write to a {type(value).__name__}; keep it in a list, a dict or an object with attributes"
                )
            changes.append(Change(place, gone))
            entries.append(new)
        return changes, entries

    def flatten(self, output: Any, entries: list[dict[Any, Any]]) -> tuple[list[Any], pytree.TreeSpec]:
        """Flatten outputs and insertions; a value that the caller passed becomes a `Given`."""
        owned = self._owned  # pytree keeps the function below alive for a while; it must hold no tensors
        leaves, spec = flatten((output, entries), is_leaf=lambda value: id(value) in owned)
        return [owned.get(id(leaf), leaf) for leaf in leaves], spec


def check_memory(program: Program, model: nn.Module, call: Call) -> None:
    """Raises `CaptureError` if memory that the program writes to is also another input, a weight or a constant."""
    if not program.written and not program.changes:
        return
    spans = {path: _span(tensor) for path, tensor in zip(call.paths, call.tensors, strict=True)}
    first = {id(tensor): path for path, tensor in reversed([*zip(call.paths, call.tensors, strict=True)])}
    others = {path: span for path, span in spans.items() if path in first.values()}
    others |= {name: _span(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    others |= {name: _span(program.constants[place]) for place, name in program.attributes.items()}
    for path in (call.paths[i] for i in program.written):
        start, end = spans[path]
        for name, (begin, stop) in others.items():
            if name != path and start < stop and begin < end:
                raise CaptureError(
                    f"the model writes to {path}, which shares memory with {name}: give it a copy of one of them"
                )
    holders = [id(value) for _, value in _places(call.arguments)]
    for change in program.changes:
        if change.held is None and holders.count(id(_find(call.arguments, change.place))) > 1:
            raise CaptureError(
                f"the model writes to {'.'.join(map(str, change.place))}, which was given to it twice; give it a copy"
            )


def returned(program: Program, outputs: Sequence[Tensor], call: Call) -> Any:
    """Write to the caller's arguments as the model would, and return what it would return."""
    written = [call.tensors[i] for i in program.written]
    shared = {_memory(tensor) for tensor in (*written, *program.constants.values())}
    plain = [type(tensor) is Tensor for tensor in outputs]  # others have no memory yet
    own = [x.clone() if here and _memory(x) in shared else x for x, here in zip(outputs, plain, strict=True)]
    supply = iter(sharing(program.shared, own))
    output, entries = arranged(program, supply, call)
    for tensor, value in zip(written, supply, strict=True):
        tensor.copy_(value)
    for change, new in zip(program.changes, entries, strict=True):
        held = change.held is not None
        _apply(table_of(change.held.value()) if held else _table(_find(call.arguments, change.place)), change, new)
        if held:
            mark_left_behind(tensors_in(new))
    return output


def arranged(program: Program, outputs: Iterator[Tensor], call: Call) -> tuple[Any, Any]:
    """What the model returns, made of the first `outputs`; and what it puts into each of its changes."""
    leaves = [_leaf(leaf, outputs, call) for leaf in program.out_leaves]
    return pytree.tree_unflatten(leaves, program.out_spec)


def results_of(run: Callable[[dict[str, Any]], Any], call: Call, tensors: Sequence[Any]) -> list[Any]:
    """Run on copies of the arguments; return its flat outputs and writes. The run may write to `tensors`."""
    copies = call.rebuild(tensors)
    arguments = Arguments(call, copies)
    result = flatten((run(copies), arguments.changes()[1]))[0]
    return result + [each for i, each in enumerate(tensors) if i not in call.numbers]


def unsplit(model: nn.Module, call: Call, program: Program | None = None) -> list[Tensor]:
    """Run the model itself; return its outputs in the order of its program's. The arguments are left unchanged.

    Args:
        program: of the model; needed if calls leave tensors behind.
    """
    tensors = [writable_copy(tensor) for tensor in call.tensors]
    versions = [tensor._version for tensor in tensors]
    copies = call.rebuild(call.with_numbers(tensors))
    arguments = Arguments(call, copies)
    leaves, _ = arguments.flatten(call.run(model, copies), arguments.changes()[1])
    written = [tensor for tensor, version in zip(tensors, versions, strict=True) if tensor._version != version]
    left = left_by(program) if program is not None else []
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)] + left + written


def _leaf(leaf: Any, supply: Iterator[Tensor], call: Call) -> Any:
    if leaf is ...:
        return next(supply)
    return _find(call.arguments, leaf.place) if isinstance(leaf, Given) else copied(leaf)


def _apply(table: Any, change: Change, new: dict[Any, Any]) -> None:
    for key in reversed(change.removed):
        del table[key]
    for key, item in new.items():
        if isinstance(table, list) and key >= min(len(table), len(table) if change.grows is None else change.grows):
            table.append(item)
        elif type(table) is CellType:
            table.cell_contents = item
        else:
            table[key] = item


def _places(value: Any, place: tuple[Any, ...] = (), above: tuple[int, ...] = ()) -> Iterator[tuple[Any, Any]]:
    """Yield `value` and everything in it, each with the keys that lead to it."""
    yield place, value
    if id(value) not in above:
        for key, inner in _inside(value).items():
            yield from _places(inner, (*place, key), (*above, id(value)))


def _find(value: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        value = _inside(value)[key]
    return value


def _inside(value: Any) -> dict[Any, Any]:
    """The contents of a container, by key."""
    table = value if isinstance(value, tuple) else _table(value)
    if table is None and isinstance(value, dict):
        table = value
    elif table is None and type(value) in pytree.SUPPORTED_NODES:
        table = pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)[0]
    elif table is None:
        table = parts_of(value)
    return {} if table is None else dict(table) if isinstance(table, dict) else dict(enumerate(table))


def _table(value: Any) -> Any:
    """The dict or list through which a container can be written to."""
    if type(value) in (dict, list, OrderedDict, defaultdict):
        return value
    return vars(value) if not isinstance(value, PLAIN) and is_open(value) else None


def _same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and isinstance(one, PLAIN) and one == other)


def writable_copy(tensor: Tensor) -> Tensor:
    """A copy with the same strides, for a run that may write to it."""
    if torch._debug_has_internal_overlap(tensor) == 1:
        return tensor  # nothing can write to it
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _span(tensor: Tensor) -> tuple[int, int]:
    """The address range [first byte, end) of a tensor's elements; (0, 0) if it has no memory."""
    if isinstance(tensor, FakeTensor) or is_traceable_wrapper_subclass(tensor) or not tensor.numel():
        return (0, 0)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()
