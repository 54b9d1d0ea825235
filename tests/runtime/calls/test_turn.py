"""One call at a time; under torchrun from one thread."""

from __future__ import annotations

import _thread
import threading
import time
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


def test_a_thread_that_python_has_not_started_counts_as_ended_once_it_has() -> None:
    turn, taken = Turn(one_thread=True), threading.Event()

    def first() -> None:
        take(turn)
        taken.set()

    _thread.start_new_thread(first, ())
    assert taken.wait(60)
    until = time.monotonic() + 60
    while turn._is_alive(turn._thread) and time.monotonic() < until:  # pyright: ignore[reportArgumentType]
        time.sleep(0.01)
    assert take(turn)


def test_of_one_thread_only_the_others_may_end_things_and_take_over_when_it_has_ended() -> None:
    turn = Turn(one_thread=True)
    with ThreadPoolExecutor(1, "first") as pool:
        assert pool.submit(take, turn).result()
        with pytest.raises(RuntimeError, match=r"'MainThread' calls a parallel module whose .* from 'first_0'"):
            take(turn)
        assert take(turn, ending=True)
        assert pool.submit(take, turn).result()
    assert take(turn)
