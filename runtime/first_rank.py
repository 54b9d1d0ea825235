"""Calls that rank 0 alone makes: the others get what it returns, tensors through gloo and the rest pickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .agreement import INPUT_SAMPLES, all_close, sampled
from .board import Board
from .errors import DisagreementError
from .groups import host_group
from .pickling import Pickler, Unpickler
from .process_group import abandon, broadcast, finish

PLAIN = (bool, int, float, complex, str, type(None))  #: arguments that are compared by what they look like


class FirstRank:
    """What the parts of a pipeline that run on rank 0 alone share: meetings before each call, and a group."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._keys: list[str] = []  #: what this rank has set in this meeting
        self._group: Any = None

    def meet(self, what: str, arguments: Mapping[str, Any]) -> None:
        """Meet the other ranks before a call, and compare its arguments.

        So rank 0 is never a call ahead, and no rank takes the result of another call.

        Args:
            what: the part that is called.

        Raises:
            DisagreementError: on every rank, if one calls another part or with other values.
            RankError: a rank failed or did not come.
        """
        board = self._board
        board.meetings += 1
        old, self._keys = self._keys, []
        mine = json.dumps({"call": board.call, "what": what, "arguments": described(arguments)})
        key = f"first/{board.meetings}"
        self._keys.append(f"{key}/{board.rank}")
        with board.meeting("a part that runs on rank 0 alone"):
            calls = [json.loads(text) for text in board.all_gather(key, mine, f"the other ranks to call {what}")]
        for each in old:  # all have read it, for they have come to this meeting
            board.drop(each)
        board.call = calls[0]["call"]  # a rank whose last call failed before it met the others is ahead
        for rank, call in enumerate(calls):
            if difference := _difference(calls[0], call, rank):
                raise DisagreementError(difference)

    def send(self, what: str, value: Any) -> None:
        """Send what rank 0 has computed.

        Raises:
            TypeError: it cannot be sent.
        """
        try:
            payload, tensors = packed(value)
        except Exception as error:
            raise TypeError(
                f"what {what} returns cannot be sent to the other ranks ({error}); leave it out of on_first_rank"
            ) from error
        kinds = [[list(each.shape), str(each.dtype).removeprefix("torch."), each.device.type] for each in tensors]
        self._set(f"first/{self._board.meetings}/result", json.dumps([len(payload), kinds]))
        self.broadcast(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
        for each in tensors:
            self.broadcast(_bytes_of(each.cpu()))

    def awaited(self, what: str) -> Callable[[torch.device], Any]:
        """Wait until rank 0 has computed; returns what receives its result.

        Raises:
            RankError: rank 0 failed; or another one did.
        """
        text = self._board.read(f"first/{self._board.meetings}/result", f"rank 0 to compute {what}")
        size, kinds = json.loads(text)

        def receive(device: torch.device) -> Any:
            payload = torch.empty(size, dtype=torch.uint8)
            self.broadcast(payload)
            tensors = []
            for shape, dtype, kind in kinds:
                tensor = torch.empty(shape, dtype=getattr(torch, dtype))
                self.broadcast(_bytes_of(tensor))
                tensors.append(tensor if kind == "cpu" else tensor.to(device))
            return Unpickler(payload.numpy().tobytes(), tensors.__getitem__).load()

        return receive

    def _set(self, key: str, text: str) -> None:
        self._keys.append(key)
        self._board.set(key, text)

    def broadcast(self, tensor: Tensor, what: str = "a result of rank 0") -> None:
        """Give all ranks the bytes [n] that rank 0 has on the CPU, in place.

        Raises:
            RankError: a rank failed or did not come.
        """
        if self._group is None:
            self._group = host_group(self._board)
        if tensor.numel():
            finish(broadcast(self._group, tensor), self._board, what)

    def abort(self, error: BaseException) -> None:
        """End this rank's part in later meetings: `error` has left messages in flight."""
        if self._group is not None:
            abandon(self._group, error)


def described(arguments: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Of each leaf of the arguments, by name: its kind, and its value as far as it is compared."""
    found: dict[str, list[Any]] = {}
    for name, value in arguments.items():
        leaves = pytree.tree_leaves(value)
        for i, leaf in enumerate(leaves):
            found[name if len(leaves) == 1 else f"{name}[{i}]"] = _description(leaf)
    return found


def _description(leaf: Any) -> list[Any]:
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biuf":
        leaf = torch.from_numpy(np.ascontiguousarray(leaf))
    if isinstance(leaf, Tensor):
        kind = f"{tuple(leaf.shape)} {leaf.dtype}"
        if leaf.is_floating_point() or leaf.is_complex():
            return [kind, sampled(leaf, INPUT_SAMPLES)]
        return [kind, hashlib.sha256(_bytes_of(leaf.detach().cpu()).numpy().tobytes()).hexdigest()]
    return [repr(leaf) if isinstance(leaf, PLAIN) else type(leaf).__name__, ""]


def _difference(first: Mapping[str, Any], other: Mapping[str, Any], rank: int) -> str:
    """How a rank's call differs from rank 0's; empty if it does not."""
    if first["what"] != other["what"]:
        return (
            f"rank {rank} calls {other['what']}, rank 0 {first['what']}, which both run on rank 0 alone: a rank left a "
            "picture early (an exception in a callback?), or makes other calls; begin the next picture on all ranks"
        )
    ours, theirs = first["arguments"], other["arguments"]
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        (kind, value), (their_kind, their_value) = ours.get(name, ["none", ""]), theirs.get(name, ["none", ""])
        if kind != their_kind:
            return f"rank {rank} calls {other['what']} with {their_kind} for `{name}`, rank 0 with {kind}"
        same = all_close(value, their_value) if isinstance(value, list) else value == their_value
        if not same:
            return (
                f"rank {rank} calls {other['what']} with another value of `{name}` than rank 0; every rank must be "
                "given the same prompts and pictures"
            )
    return ""


def packed(value: Any) -> tuple[bytes, Sequence[Tensor]]:
    """A value as bytes, and the tensors in it, each once."""
    places: dict[int, int] = {}
    given: list[Tensor] = []  # kept, so that no identity is given again
    tensors: list[Tensor] = []

    def place(tensor: Tensor) -> int:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_quantized:
            raise TypeError(f"it has a {type(tensor).__name__}, which is no plain tensor")
        if tensor.device.type == "meta":
            raise TypeError("it has a tensor without values, on the device meta")
        if id(tensor) not in places:
            places[id(tensor)] = len(tensors)
            given.append(tensor)
            tensors.append(tensor.detach().resolve_conj().resolve_neg())
        return places[id(tensor)]

    return bytes(Pickler(place).pickled(value)), tensors


def _bytes_of(tensor: Tensor) -> Tensor:
    """The bytes [n] of a tensor on the CPU; those of a contiguous one are its memory."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
