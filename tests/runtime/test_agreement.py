"""What ranks compare before their first exchange."""

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fxpass.ir.step import EXACT
from fxpass.ir.versions import versions
from fxpass.runtime import agreement
from fxpass.runtime.agreement import _first_difference
from fxpass.runtime.errors import DisagreementError
from fxpass.runtime.executor import Question
from tests.runtime.calls.test_clock import NoReads


def test_a_checkout_that_is_not_installed_has_a_version_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("fxpass.ir.versions.version", missing)
    assert versions() == ("not installed", torch.__version__)


class Recorded:
    """A network of two ranks whose other rank sends what this one sends."""

    def __init__(self) -> None:
        self.board: Any = SimpleNamespace(rank=0, world=2, call=7, meeting=nullcontext)
        self.gets = 0

    def open(self, specs: Any, device: torch.device) -> list[Any]:
        return [[self]]

    def settle(self, device: torch.device) -> None:
        pass

    def put(self, packed: Any) -> None:
        self.sent = packed[0][1]

    def get(self) -> list[Tensor]:
        self.gets += 1
        return [torch.stack([self.sent, self.sent])]


def test_a_call_is_compared_with_one_message_and_no_other_wait_for_the_device() -> None:
    network: Any = Recorded()
    check = agreement.CallCheck(network, 1, ["sample", "wave", "nothing"], torch.device("cpu"), Counter())
    inputs: list[Tensor] = [torch.randn(3, 100), torch.randn(7, dtype=torch.complex64), torch.empty(0)]
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


class Others(Recorded):
    """Another rank that sends something else: its first numbers are changed."""

    def __init__(self, change: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.change = change

    def get(self) -> list[Tensor]:
        other = self.sent.clone()
        self.change(other)
        return [torch.stack([self.sent, other])]


def decided(change: Callable[[Tensor], None], inputs: Tensor) -> Any:
    network: Any = Others(change)
    check = agreement.CallCheck(network, 1, ["label"], torch.device("cpu"), Counter())
    question = Question((), lambda _: EXACT, generation=2, call=5, state=11)
    return check.decide([inputs], question), network.board.call


def test_ranks_that_have_run_other_calls_before_are_told_apart() -> None:
    def other_state(numbers: Tensor) -> None:
        numbers[2] = 12

    with pytest.raises(DisagreementError, match="rank 1 has run other calls than rank 0 before this one"):
        decided(other_state, torch.ones(3))


def test_a_rank_that_runs_another_number_of_the_calls_that_run_at_once_is_told_apart() -> None:
    def both(numbers: Tensor) -> None:
        numbers[4] = 2

    with pytest.raises(DisagreementError, match=r"rank 1 runs 2 of the calls .*, rank 0 1: on some ranks only was the"):
        decided(both, torch.ones(3))


def test_a_rank_takes_the_number_of_rank_0s_call() -> None:
    def ahead(numbers: Tensor) -> None:
        numbers[3] = 9

    assert decided(ahead, torch.ones(3)) == (EXACT, 7)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_whole_numbers_are_compared_exactly(dtype: torch.dtype) -> None:
    def one_more(numbers: Tensor) -> None:
        numbers[6] = numbers[6] + 1 if dtype is not torch.bool else 1 - numbers[6]

    given = torch.tensor([208, 1, 0]).to(dtype)
    if dtype is torch.float32:
        assert decided(one_more, given)[0] == EXACT  # within what devices round
    else:
        with pytest.raises(DisagreementError, match="another value of `label`"):
            decided(one_more, given)


def test_one_rank_alone_sends_nothing() -> None:
    network: Any = SimpleNamespace(board=SimpleNamespace(rank=0, world=1, call=1))
    check = agreement.CallCheck(network, 1, ["x"], torch.device("cpu"), Counter())
    assert check.decide([torch.ones(2)], Question((), lambda _: EXACT)) == EXACT


def test_one_difference_is_named_and_more_are_counted() -> None:
    ours = {"plan": "a", "input x": "(2, 4)", "weight w": "1"}
    one = _first_difference(1, ours, ours | {"weight w": "2"})
    assert one == "rank 1 differs from rank 0 in the weight w: 2, rank 0 has 1"
    two = _first_difference(1, ours, ours | {"weight w": "2", "input x": "(3, 4)"})
    assert two == "rank 1 differs from rank 0 in the input x: (3, 4), rank 0 has (2, 4) (2 differences in all)"
