"""Python's garbage collector: paused while graphs are built, and made to find objects that were frozen."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Iterator[None]:
    """Switch cyclic garbage collection off, and back on afterwards if it was on.

    While graphs are built, it would traverse large live graphs and free nothing.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def unfreeze() -> None:
    """Let `gc.get_objects` and `gc.get_referrers` find the objects that `gc.freeze` has hidden from them.

    They stay unfrozen: to freeze again would hide, and never free, what has been made since.
    """
    if gc.get_freeze_count():
        gc.unfreeze()
