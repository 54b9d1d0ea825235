"""What a rank keeps of the outputs of a step for later steps of any plan: its own rows, which nobody gathers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Holding:
    """What a step takes of the values that ranks have kept, each of which has a number, and what they keep of it."""

    takes: Mapping[int, int] = field(default_factory=dict)  #: index of an input -> number
    keeps: Mapping[int, int] = field(default_factory=dict)  #: index of an output -> number


NOTHING = Holding()


class Held:
    """The values that one rank has kept, by number."""

    def __init__(self) -> None:
        self._values: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._values)

    def inputs(self, given: Sequence[Tensor], holding: Holding) -> list[Tensor]:
        """The inputs of this rank's step."""
        return [self._values[holding.takes[i]] if i in holding.takes else x for i, x in enumerate(given)]

    def outputs(self, found: Sequence[Tensor], holding: Holding) -> list[Tensor]:
        """The outputs of a step without those that the rank keeps, in whose places are tensors without elements."""
        results = list(found)
        with torch.inference_mode(False), torch.no_grad():
            for i, number in holding.keeps.items():
                value = results[i]
                part = value.untyped_storage().nbytes() > value.nbytes  # it would keep the memory of the rest
                self._values[number] = value.clone() if part else value
                results[i] = value.new_empty(0)
        return results

    def forget(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._values.pop(number, None)
