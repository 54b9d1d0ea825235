"""`make fuzz`: new random examples for every property of `tests/passes`, for some minutes.

Each property, a test function, has the same share of the time, and shares it evenly among its parameters. It runs in
turns of a few examples, each turn with a seed of its own. A failure prints the command that repeats its turn.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import re
import shlex
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import pytest
from _pytest.runner import runtestprotocol

FOLDER = "tests/passes"


@dataclass
class Found:
    """What one process ran, by property."""

    examples: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    failures: Counter[tuple[str, str]] = field(default_factory=Counter)  #: times that (node, error) was met


class Fuzzer:
    """A pytest plugin: turns instead of one run of each test."""

    def __init__(self, minutes: float, seed: int, share: int, shares: int, only: str | None) -> None:
        self.minutes, self.share, self.shares, self.only = minutes, share, shares, only
        self.seeds = random.Random(seed + share)
        self.seed = seed
        self.spent: dict[str, float] = {}  # seconds by node
        self.found = Found()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        properties_ = [item for item in items if getattr(getattr(item, "obj", None), "is_hypothesis_test", False)]
        if self.only:
            items[:] = [i for i in properties_ if i.nodeid == self.only]
        else:
            names = list(dict.fromkeys(map(property_of, properties_)))
            mine = names[self.share :: self.shares]
            items[:] = [item for item in properties_ if property_of(item) in mine]

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.found.examples.update(dict.fromkeys(map(property_of, session.items), 0))
        if self.only:
            for item in session.items:
                self._turn(item, self.seed)
            return True
        end = time.monotonic() + 60 * self.minutes
        while time.monotonic() < end:
            self._turn(min(session.items, key=self._spent), self.seeds.getrandbits(32))
        return True

    def _spent(self, item: pytest.Item) -> tuple[float, float]:
        """Seconds of the property, then with these parameters."""
        return self.found.seconds.get(property_of(item), 0.0), self.spent.get(item.nodeid, 0.0)

    def _turn(self, item: pytest.Item, seed: int) -> None:
        """Draw a few examples of one property."""
        import hypothesis  # not before pytest runs, which rewrites its assertions and warns if it cannot

        from tests import properties

        hypothesis.seed(seed)(item.obj)
        begun, start = properties.begun, time.monotonic()
        reports = runtestprotocol(item, log=False, nextitem=None)
        drawn = properties.begun - begun
        of_property, of_node = self._spent(item)
        self.spent[item.nodeid] = of_node + time.monotonic() - start
        self.found.seconds[property_of(item)] = of_property + time.monotonic() - start
        self.found.examples[property_of(item)] += min(drawn, properties.FUZZ_EXAMPLES)  # shrinking draws more of them
        for report in reports:
            if report.failed:
                self._failed(item, seed, report)

    def _failed(self, item: pytest.Item, seed: int, report: pytest.TestReport) -> None:
        """Count a failure, and print it in full the first time."""
        lines = re.findall(r"^E +(\S.*)", report.longreprtext, re.MULTILINE)
        kind = item.nodeid, re.sub(r"[\d.]+(e[+-]\d+)?", "#", lines[0] if lines else report.longreprtext[-200:])
        self.found.failures[kind] += 1
        if self.found.failures[kind] == 1:
            repeat = f"{sys.executable} -m tests.fuzz --only {shlex.quote(item.nodeid)} --seed {seed}"
            print(f"{'=' * 120}\nFAILED {item.nodeid}\n\n{report.longreprtext}\n\nrepeat it: {repeat}\n", flush=True)


def property_of(item: pytest.Item) -> str:
    return item.nodeid.split("[")[0]


def fuzz(minutes: float, seed: int, share: int, shares: int, only: str | None, match: str) -> Found:
    """One process's turns."""
    fuzzer = Fuzzer(minutes, seed, share, shares, only)
    options = ["-m", "", "-p", "no:xdist", "-p", "no:cacheprovider", "--timeout=0", "--hypothesis-profile=fuzz"]
    code = pytest.main([FOLDER, "-k", match, "--no-header", "--no-summary", *options], plugins=[fuzzer])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {code!r} before any property ran")
    return fuzzer.found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--seed", type=int, help="another run's, to repeat it; a new one where it is not given")
    parser.add_argument("--only", metavar="NODE", help="one turn of one property")
    parser.add_argument("--match", metavar="EXPRESSION", default="", help="only properties that pytest's -k selects")
    args = parser.parse_args()
    if args.minutes <= 0 or args.jobs < 1:
        parser.error("--minutes and --jobs are above 0")
    seed = random.SystemRandom().getrandbits(32) if args.seed is None else args.seed
    jobs = 1 if args.only else args.jobs
    print(f"seed {seed}, {jobs} processes", flush=True)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(fuzz, args.minutes, seed, k, jobs, args.only, args.match) for k in range(jobs)]
        found = [future.result() for future in futures]
    return summary(found)


def summary(found: list[Found]) -> int:
    """Print examples by property and all failures; 1 where there are any."""
    examples, failures = Counter[str](), Counter[tuple[str, str]]()
    seconds = {name: spent for each in found for name, spent in each.seconds.items()}
    for each in found:
        examples.update(each.examples)
        failures.update(each.failures)
    for name, count in examples.items():
        print(f"{count:8} examples {seconds.get(name, 0.0):7.1f} s  {name}")
    fewest = min(examples.values(), default=0)
    print(f"{sum(examples.values()):8} examples of {len(examples)} properties, at least {fewest} of each")
    for (name, error), times in failures.items():
        print(f"FAILED {times} times: {name}: {error}")
    print("no failure" if not failures else f"{len(failures)} failures; how to repeat each is printed above")
    return int(bool(failures) or not sum(examples.values()))


if __name__ == "__main__":
    sys.exit(main())
