"""Bring the weights of the driving process to its workers: as the same memory (CPU), or as copies (GPUs).

Copies travel through a buffer of shared host memory, piece by piece: that needs no peer access between devices, works
with every allocator of device memory, and with the 64 MB of shared memory that containers have. What is noticed when:

- At each call, whatever torch counts or shows: another tensor, storage, layout or dtype, and writes in place.
- Writes that torch does not count (`weight.data`, writes to tensors made in inference mode), at the next call for which
  `look` is set: the contents are then compared by 64 bits of each weight, computed on its device.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from math import prod
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..ir.code import Form
from .memory import check_gpu, check_shm
from .wire import raise_file_limit
from .workers import Workers

Readers = Mapping[str, Collection[int]]  #: of each weight: the workers that need it
PIECE = 32 << 20  #: bytes of the buffer
_WORDS = 1 << 21  #: words of 64 bits that are mixed at once: 16 MB, so that caches of devices hold them
_FACTORS = (-7046029254386353131, -4658895280553007687, -7723592293110705685)  #: odd int64, with bits all over


class SharedWeights:
    """Weights of one executor in memory that the workers share, moved there in place. Writes to it need no message."""

    def __init__(self, workers: Workers, scope: str) -> None:
        self._workers = workers
        self._scope = scope
        self._sent: dict[str, Tensor] = {}  #: kept alive so that no address is reused
        self._holders: dict[str, set[int]] = {}  #: the workers that have what was sent

    def bring(
        self, names: Sequence[str], weights: Sequence[Tensor], readers: Readers, *, look: bool, seconds: float
    ) -> None:
        """Send the workers what they need and do not have. `look` and `seconds` are for copies.

        Raises:
            OSError: too little shared memory, or too low a limit of open files.
            RankError: a worker failed.
        """
        if not self._workers.connections:
            return
        new: dict[str, Tensor] = {}
        lacking: dict[int, list[str]] = {}  #: of each worker
        for name, weight in zip(names, weights, strict=True):
            if name not in self._sent or _place(self._sent[name]) != _place(weight):
                self._holders[name] = set()
            if lack := set(readers[name]) - self._holders[name]:
                new[name] = weight.detach()
                for worker in lack:
                    lacking.setdefault(worker, []).append(name)
        if not new:
            return
        storages = {weight.untyped_storage().data_ptr(): weight.untyped_storage() for weight in new.values()}
        size = sum(storage.nbytes() for storage in storages.values() if not storage.is_shared())
        check_shm(size, "sharing this model's weights")
        raise_file_limit(len(storages))
        for worker, some in lacking.items():
            self._workers.send_to(worker, ("weights", {self._scope + name: new[name] for name in some}))
            for name in some:
                self._holders[name].add(worker)
        self._sent.update(new)

    def drop(self, names: Sequence[str]) -> None:
        """The workers have forgotten these."""
        for name in names:
            del self._sent[name], self._holders[name]

    def names(self) -> list[str]:
        """Those that some worker has."""
        return list(self._sent)


class CopiedWeights:
    """Weights of one executor, of which each worker has copies on its device: written once, and where they change.

    Names of one tensor (tied weights) share one copy.
    """

    def __init__(self, workers: Workers, scope: str) -> None:
        self._workers = workers
        self._scope = scope
        self._seen: dict[str, tuple[ref[Tensor], StorageWeakRef, tuple[Any, ...]]] = {}  #: what was sent
        self._digests: dict[str, int] = {}  #: of its contents
        self._copies: dict[str, int] = {}  #: the number of the copy that a name has on the workers
        self._holders: dict[str, set[int]] = {}  #: the workers that have a copy
        self._numbers = itertools.count()

    def bring(
        self, names: Sequence[str], weights: Sequence[Tensor], readers: Readers, *, look: bool, seconds: float
    ) -> None:
        """Send the workers what they need and do not have, and what has changed of what they have.

        Args:
            look: compare contents, too.
            seconds: allowed for each piece.

        Raises:
            OSError: too little shared memory.
            RankError: a worker failed.
        """
        given = {name: weight for name, weight in zip(names, weights, strict=True) if self._needed(name, readers)}
        if not self._workers.connections:
            return
        moved = {name for name, weight in given.items() if not self._is_seen(name, weight)}
        moved |= {name for name in given if not set(readers[name]) <= self._holders.get(name, set())}
        if not look and not moved:
            return
        # torch may count a write to a tensor under one of its names only
        groups = [group for group in _tied(given) if look or not moved.isdisjoint(group)]
        found = digests_of([given[first] for first, *_ in groups])
        digests = {name: digest for group, digest in zip(groups, found, strict=True) for name in group}
        new = [
            group
            for group in groups
            if not moved.isdisjoint(group) or any(digests[name] != self._digests[name] for name in group)
        ]
        changed = [name for group in new for name in group]
        for group in new:
            for name in group:  # tied ones are on the same workers
                others = self._holders.setdefault(name, set())
                others.update(*(readers[each] for each in group), *(self._holders.get(each, ()) for each in group))
        self._send({name: given[name] for name in changed}, seconds)
        for name in changed:
            weight = given[name]
            # the references keep identities from being reused, not memory
            self._seen[name] = ref(weight), StorageWeakRef(weight.untyped_storage()), _state(weight)
        self._digests |= digests

    def _needed(self, name: str, readers: Readers) -> bool:
        """Whether a worker needs a weight, or has it."""
        return bool(readers[name] or self._holders.get(name))

    def _is_seen(self, name: str, weight: Tensor) -> bool:
        seen = self._seen.get(name)
        if seen is None or seen[2] != _state(weight):
            return False
        return seen[0]() is weight or seen[1].cdata == weight.untyped_storage()._cdata

    def _send(self, weights: Mapping[str, Tensor], seconds: float) -> None:
        if not weights:
            return
        buffer = self._workers.buffer
        if buffer is None:
            check_shm(PIECE, "sending this model's weights to the workers")
            with torch.inference_mode(False):  # later calls write to it, also outside inference mode
                self._workers.buffer = buffer = torch.empty(PIECE, dtype=torch.uint8)
            self._workers.send(("buffer", buffer))
        groups = _tied(weights)
        self._workers.send(("drop", [self._scope + name for name in self._taken(groups)]))
        flat = {self._scope + name: dense(weights[name]) for name, *_ in groups}
        for worker in range(1, len(self._workers.connections) + 1):
            own = [group for group in groups if worker in self._holders[group[0]]]
            if forms := {self._scope + first: Form.of(flat[self._scope + first]) for first, *_ in own}:
                self._workers.send_to(worker, ("copies", forms))
            if tied := {self._scope + name: self._scope + first for first, *others in own for name in others}:
                self._workers.send_to(worker, ("tied", tied))
        contents = {name: bytes_of(weight) for name, weight in flat.items()}
        for piece in pieces({name: len(each) for name, each in contents.items()}, PIECE):
            for (name, start, size), view in zip(piece, views(buffer, piece), strict=True):
                view.copy_(contents[name][start : start + size])
            self._workers.send(("piece", piece))
            self._workers.answers(seconds)

    def _taken(self, groups: Sequence[Sequence[str]]) -> list[str]:
        """Number the copies of names that are tied from now on.

        Returns:
            The names whose copy is read under other names, too, and so must not be written to.
        """
        taken: list[str] = []
        for group in groups:
            first = self._copies.get(group[0])
            readers = {name for name, copy in self._copies.items() if copy == first}
            if not readers <= {*group}:
                taken.append(group[0])
            self._copies |= dict.fromkeys(group, next(self._numbers))
        return taken

    def drop(self, names: Sequence[str]) -> None:
        """The workers have forgotten these."""
        for name in names:
            del self._seen[name], self._digests[name], self._copies[name], self._holders[name]

    def names(self) -> list[str]:
        """Those that some worker has."""
        return list(self._seen)


Weights = SharedWeights | CopiedWeights


def _tied(weights: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of each tensor."""
    groups: dict[Any, list[str]] = {}
    for name, weight in weights.items():
        groups.setdefault((weight.device, _place(weight)), []).append(name)
    return list(groups.values())


def allocate(forms: Mapping[str, Form], held: dict[str, Tensor], device: torch.device) -> None:
    """Make room for copies of weights, in a worker. A copy that has the new form stays, so that graphs may read it.

    Args:
        forms: of the driving process's weights, by name. What is on the CPU there is on the CPU here.
        held: the copies so far; changed in place.

    Raises:
        OSError: the device has too little memory left.
    """
    here = {name: form if form.device.type == "cpu" else form._replace(device=device) for name, form in forms.items()}
    new = {name: form for name, form in here.items() if name not in held or Form.of(held[name]) != form}
    for name in new:
        held.pop(name, None)
    if device.type == "cuda":
        size = sum(prod(form.shape) * form.dtype.itemsize for form in new.values() if form.device == device)
        advice = "use fewer or larger devices, or end what else uses this one"
        check_gpu(size, device, "a copy of the model's weights", advice)
    held |= {name: form.empty() for name, form in new.items()}


Piece = list[tuple[str, int, int]]  #: (weight, where its part begins, size): parts one after the other, in bytes


def pieces(sizes: Mapping[str, int], room: int) -> Iterator[Piece]:
    """All bytes of some weights, in pieces of at most `room` bytes."""
    piece: Piece = []
    left = room
    for name, size in sizes.items():
        start = 0
        while start < size:
            part = min(left, size - start)
            piece.append((name, start, part))
            start, left = start + part, left - part
            if not left:
                yield piece
                piece, left = [], room
    if piece:
        yield piece


def views(buffer: Tensor, piece: Piece) -> Sequence[Tensor]:
    """The parts of a piece in the buffer."""
    return buffer[: sum(size for _, _, size in piece)].split([size for _, _, size in piece])


def dense(weight: Tensor) -> Tensor:
    """A weight whose elements lie in one piece, without gaps; itself if it is such a one."""
    if weight.is_contiguous() and not weight.is_conj() and not weight.is_neg():
        return weight
    weight = weight.detach().resolve_conj().resolve_neg()
    return weight if torch.empty_like(weight, device="meta").stride() == weight.stride() else weight.clone()


def bytes_of(weight: Tensor) -> Tensor:
    """The bytes of a dense tensor in the order of its memory, as a view."""
    return weight.as_strided((weight.numel(),), (1,), weight.storage_offset()).view(torch.uint8)


def digests_of(weights: Sequence[Tensor]) -> list[int]:
    """64 bits of each weight's contents. The host waits once for each device."""
    results: list[int] = [0] * len(weights)
    for device in {weight.device for weight in weights}:
        here = [i for i, weight in enumerate(weights) if weight.device == device]
        for i, digest in zip(here, _digests([weights[i] for i in here], device).tolist(), strict=True):
            results[i] = digest
    return results


@torch.no_grad()
def _digests(weights: Sequence[Tensor], device: torch.device) -> Tensor:
    """Sums of the mixed 64-bit words of each weight: int64 [weights]."""
    contents = [bytes_of(dense(weight)) for weight in weights]
    sizes = {str(i): -(-len(each) // 8) for i, each in enumerate(contents)}
    buffer = torch.empty(min(_WORDS, sum(sizes.values())), dtype=torch.int64, device=device)
    totals = torch.zeros(len(weights), dtype=torch.int64, device=device)
    for piece in pieces(sizes, _WORDS):
        words = buffer[: sum(size for _, _, size in piece)]
        parts = words.split([size for _, _, size in piece])
        for (name, start, size), part in zip(piece, parts, strict=True):
            source = contents[int(name)][8 * start : 8 * (start + size)]
            target = part.view(torch.uint8)
            target[: len(source)] = source
            target[len(source) :] = 0
        _mix(words, torch.cat([torch.arange(start, start + size, device=device) for _, start, size in piece]))
        for (name, _, _), part in zip(piece, parts, strict=True):
            totals[int(name)] += part.sum()
    return totals


def _mix(words: Tensor, places: Tensor) -> None:
    """Replace words by hashes of them and of their places, in place. Different words at one place stay different.

    A sum of words, or of products of words, would not see an even number of changes of the highest bit. So each round
    multiplies, which carries bits upwards, then adds the upper half of each word to the lower one without carry.

    Args:
        words, places: int64 [n], the places from 0; both are written to.
    """
    places += 1
    places *= _FACTORS[0]
    words ^= places
    lower, upper = words.view(torch.int32).view(-1, 2).unbind(1)  # of a little-endian machine
    for factor in _FACTORS:
        words *= factor
        lower ^= upper


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """The address and layout of a tensor: equal for two views of the same elements."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg()


def _state(tensor: Tensor) -> tuple[Any, ...]:
    """The memory of a tensor, and how many writes torch has counted; it counts none to inference tensors."""
    version = None if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg()
