"""What ranks compare before their first exchange."""

from collections import Counter
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fxpass.ir.step import EXACT
from fxpass.runtime import agreement
from fxpass.runtime.executor import Question
from tests.runtime.test_clock import NoReads


def test_a_checkout_that_is_not_installed_has_a_version_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(agreement, "version", missing)
    assert agreement._version() == "not installed"


class Recorded:
    """A network of two ranks whose other rank sends what this one sends."""

    def __init__(self) -> None:
        self.board: Any = SimpleNamespace(rank=0, world=2)
        self.gets = 0

    def open(self, specs: Any, device: torch.device) -> list[Any]:
        return [self]

    def put(self, packed: Any) -> None:
        self.sent = packed[0][1]

    def get(self) -> list[Tensor]:
        self.gets += 1
        return [torch.stack([self.sent, self.sent])]


def test_a_call_is_compared_with_one_message_and_no_other_wait_for_the_device() -> None:
    network: Any = Recorded()
    check = agreement.CallCheck(network, ["sample", "wave", "nothing"], torch.device("cpu"), Counter())
    inputs = [torch.randn(3, 100), torch.randn(7, dtype=torch.complex64), torch.empty(0)]
    facts = [torch.tensor([5.0, 1.0], dtype=torch.float64)]
    seen: list[Any] = []
    before = agreement.CallCheck._gathered

    def gathered(self: Any, parts: Any) -> Any:
        with NoReads():
            return before(self, parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement.CallCheck, "_gathered", gathered)
        patch.setattr(Tensor, "cpu", lambda x: x)  # the one wait
        found = check.decide(inputs, Question(facts, lambda values: seen.append(values) or EXACT, 3, 1))
    assert (found, seen, network.gets) == (EXACT, [[5.0, 1.0]], 1)
