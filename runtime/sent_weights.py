"""Weights that rank 0 has loaded, for the other ranks of torchrun: all are compared first, then sent one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_TABLES = frozenset(vars(nn.Module()))  #: what every module has: tables of its weights and hooks
PLAIN = (Tensor, nn.Parameter)
ADVICE = "load such weights on every rank, without weights_from_first_rank"


@dataclass(frozen=True)
class Slot:
    """A place that holds a tensor: an entry of a module's tables, an attribute, or an entry of one (list or dict)."""

    holder: Any
    key: Any
    attribute: bool  #: it is no parameter or buffer

    @property
    def tensor(self) -> Tensor:
        return self.holder[self.key]


def slots_of(models: Mapping[str, nn.Module]) -> dict[str, Slot]:
    """All places of tensors in some modules, by name."""
    found: dict[str, Slot] = {}
    for name, model in models.items():
        for path, module in model.named_modules():
            prefix = ".".join(part for part in (name, path) if part)
            for table in (module._parameters, module._buffers):
                found |= {
                    f"{prefix}.{key}": Slot(table, key, False) for key, value in table.items() if value is not None
                }
            for key, value in vars(module).items():
                if key in _TABLES:
                    continue
                if isinstance(value, Tensor):
                    found[f"{prefix}.{key}"] = Slot(vars(module), key, True)
                for index in _tensors_in(value):
                    found[f"{prefix}.{key}[{index}]"] = Slot(value, index, True)
    return found


def _tensors_in(value: Any) -> Sequence[Any]:
    pairs = enumerate(value) if type(value) is list else value.items() if type(value) is dict else ()
    return [key for key, each in pairs if isinstance(each, Tensor)]


def listed(slots: Mapping[str, Slot]) -> dict[str, list[Any]]:
    """What ranks compare of each place: its kind, and whether it has values; and what is needed to make its tensor."""
    found: dict[str, list[Any]] = {}
    first: dict[Any, str] = {}
    for name, slot in slots.items():
        tensor = slot.tensor
        wrong = type(tensor).__name__ if type(tensor) not in PLAIN else ""
        if not wrong and (tensor.layout != torch.strided or tensor.is_quantized):
            wrong = "quantised tensor" if tensor.is_quantized else f"{tensor.layout} tensor"
        kind = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
        stride: Sequence[int] = []
        if not wrong:
            dense = _is_dense(tensor)
            stride = tensor.stride() if dense else torch.empty(tensor.shape, device="meta").stride()
        memory = (id(tensor) if tensor.device.type == "meta" or wrong else tensor.data_ptr(), kind, tuple(stride))
        tied = first.setdefault(memory if tensor.numel() else name, name)
        found[name] = [kind, wrong, tensor.device.type, slot.attribute, list(stride), tied]
    return found


def difference(listings: Sequence[Mapping[str, Sequence[Any]]]) -> str:
    """Why rank 0 cannot send its weights to all; empty if it can.

    Args:
        listings: of each rank.
    """
    for rank, listing in enumerate(listings):
        for name, (_, wrong, device, attribute, *_) in listing.items():
            if wrong and not attribute:
                return f"the weight {name} of rank {rank} is a {wrong}, which is not sent; {ADVICE}"
            if rank == 0 and device == "meta" and not attribute:
                return f"rank 0, which sends the weights, has no values for {name}: it is on the device meta"
    sent = set(sendable(listings))
    for rank, listing in enumerate(listings[1:], 1):
        for name in [*listings[0], *listing]:
            ours, theirs = listings[0].get(name), listing.get(name)
            needed = theirs is not None and theirs[2] == "meta"
            if name in sent or ((ours or theirs or [None] * 4)[3] and not needed):
                continue
            own, first = (each[0] if each else "none" for each in (theirs, ours))
            if own == first:
                return f"rank {rank} has no values for {name}, and those of rank 0 are not sent; {ADVICE}"
            return (
                f"rank {rank} has {own} for the weight {name}, rank 0 has {first}; build the model on all ranks with "
                "the same configuration and dtype"
            )
    return ""


def sendable(listings: Sequence[Mapping[str, Sequence[Any]]]) -> list[str]:
    """The names of what rank 0 sends: what all ranks have, and alike."""

    def alike(name: str) -> bool:
        kinds = {(each[name][0], each[name][1]) if name in each else None for each in listings}
        return kinds == {(listings[0][name][0], "")} and listings[0][name][2] != "meta"

    return [name for name in listings[0] if alike(name)]


def send(
    slots: Mapping[str, Slot],
    listings: Sequence[Mapping[str, Sequence[Any]]],
    rank: int,
    device: torch.device,
    broadcast: Callable[[Tensor], None],
) -> None:
    """Send the weights, or take those that rank 0 sends: tied ones once.

    Args:
        device: where this rank takes what rank 0 has on a GPU.
        broadcast: gives all ranks the bytes [n] that rank 0 has, in place.
    """
    made: dict[str, Tensor] = {}  # by the name that ties have in common
    parameters: dict[str, nn.Parameter] = {}
    for name in sendable(listings):
        kind, _, where, _, stride, tied = listings[0][name]
        slot = slots[name]
        if tied not in made:
            if rank == 0:
                made[tied] = tensor = slot.tensor.detach()
                tensor = tensor if _is_dense(tensor) else tensor.contiguous()
            else:
                dtype, place = getattr(torch, kind.partition(" ")[0]), torch.device("cpu") if where == "cpu" else device
                made[tied] = tensor = torch.empty_strided(slot.tensor.shape, stride, dtype=dtype, device=place)
            broadcast(_memory(tensor))
        if rank:
            old, new = slot.tensor, made[tied]
            if isinstance(old, nn.Parameter):
                new = parameters.setdefault(tied, nn.Parameter(new, old.requires_grad))
            slot.holder[slot.key] = new


def _memory(tensor: Tensor) -> Tensor:
    """The bytes [n] that a dense tensor lies in, in their order."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset()).view(torch.uint8)


def _is_dense(tensor: Tensor) -> bool:
    """Whether each byte of the memory that a tensor spans is that of one element."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
