"""One call at a time; under torchrun from one thread."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fxpass.runtime.calls.turn import Turn


def take(turn: Turn, **named: Any) -> bool:
    with turn.taken(**named):
        return turn.holder == threading.get_ident()


def test_threads_take_turns() -> None:
    turn = Turn()
    assert take(turn)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(take, turn).result()


def test_of_one_thread_only_the_others_may_end_things_and_take_over_when_it_has_ended() -> None:
    turn = Turn(one_thread=True)
    with ThreadPoolExecutor(1, "first") as pool:
        assert pool.submit(take, turn).result()
        with pytest.raises(RuntimeError, match=r"'MainThread' calls a parallel module whose .* from 'first_0'"):
            take(turn)
        assert take(turn, ending=True)
        assert pool.submit(take, turn).result()
    assert take(turn)
