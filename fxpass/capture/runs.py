"""Count how often modules run within a call, to find what it repeats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import fx

MOST = 0.8  #: share of the operators that read weights that the repeated modules must hold
FEW = 3  #: so many modules at most


class Runs:
    """The runs of modules in a call."""

    def __init__(self) -> None:
        self._count: Counter[str] = Counter()
        self._around: dict[str, set[str]] = {}  #: the modules in which each has run

    def enter(self, path: str, around: Iterable[str]) -> None:
        """Note that a module begins, within the modules `around`."""
        self._count[path] += 1
        self._around.setdefault(path, set()).update(around)

    def repeated(self, weights: Iterable[fx.Node]) -> tuple[str, ...]:
        """The outermost modules that have run more than once, largest first, without those that hold few operators.

        Only operators that read weights count: tiles are blended row by row, in more operators than it takes to decode
        them, but not in more work. Empty if together the modules do not hold most of them.

        Args:
            weights: what the operators of the call read.
        """
        found = [
            path
            for path, count in self._count.items()
            if path and count > 1 and all(not each or self._count[each] == 1 for each in self._around[path])
        ]
        work: Counter[str] = Counter()
        operators = dict.fromkeys(user for each in weights for user in each.users)
        for node in operators:
            inside = node.meta.get("path", "")
            work.update(path for path in found if inside == path or inside.startswith(path + "."))
        largest = work.most_common(FEW)
        return tuple(p for p, _ in largest) if sum(n for _, n in largest) >= MOST * len(operators) else ()
