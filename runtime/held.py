"""What ranks keep of the outputs of a step for later steps of any plan: their own rows, which nobody gathers."""

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
    """The values that the ranks of this process have kept, by number."""

    def __init__(self) -> None:
        self._values: dict[int, list[Tensor]] = {}  #: of each rank

    def __len__(self) -> int:
        return len(self._values)

    def inputs(self, given: Sequence[Tensor], holding: Holding, ranks: int) -> list[list[Tensor]]:
        """The inputs of the step of each rank."""
        return [
            [self._values[holding.takes[i]][rank] if i in holding.takes else x for i, x in enumerate(given)]
            for rank in range(ranks)
        ]

    def outputs(self, found: Sequence[Sequence[Tensor]], holding: Holding) -> list[list[Tensor]]:
        """The outputs of each rank without those that it keeps, in whose places are tensors without elements."""
        results = [list(each) for each in found]
        with torch.inference_mode(False), torch.no_grad():
            for i, number in holding.keeps.items():
                self._values[number] = [_own(each[i]) for each in results]
                for each in results:
                    each[i] = each[i].new_empty(0)
        return results

    def forget(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._values.pop(number, None)


def _own(value: Tensor) -> Tensor:
    """The value; a copy if it would keep the memory of something larger."""
    return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
