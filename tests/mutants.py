"""`make mutants`: change one place of the compiler at a time, and see whether a test fails.

A sample of all single changes (a comparison, a bound, a flag, an operator of arithmetic) is drawn from a seed. Each
runs in a fork that has torch imported already. There the changed module replaces the original one, and the tests that
reach the changed line run, fastest first, up to the first failure. Processes that a test starts run the changed module
too. Coverage does not see lines that run in such processes only, or in a profiler: there, the tests that reach the
module run, and for the runtime those that start processes.

Which tests reach which line is recorded once for each state of the sources and tests, in `out/mutants`. The results
are kept there too, so that an interrupted run goes on where it was. Changes that alter no result stand in
`tests/mutants.toml`, with the reason. To see whether a new test kills a mutant, name both:

    python -m tests.mutants --match "fxpass/ir/coding.py:41: half - 1 -> half + 1" --tests tests/ir/test_coding.py
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import hashlib
import importlib
import importlib.machinery
import json
import os
import random
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "out" / "mutants"
REVIEWED = ROOT / "tests" / "mutants.toml"
TESTS = ["tests/ir", "tests/passes", "tests/capture", "tests/runtime"]
PROCESSES = ["tests/runtime/test_distributed.py", "tests/runtime/test_spawn.py"]
SOURCES = ["passes/**/*.py", "fxpass/ir/*.py", "fxpass/capture/*.py", *(f"runtime/{name}.py" for name in (
    "agreement", "calls/clock", "calls/engine", "calls/generation", "channels", "executor", "lockstep", "messages",
    "process_group", "shared_memory", "step_runner", "wire",
))]  # fmt: skip
NO_TESTS, LATE, BROKEN = 5, 69, 70  # exit statuses of forks; the first is pytest's
SETTINGS = "_hypothesis_internal_use_settings"  #: where hypothesis keeps a test's settings
OPTIONS = ["-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider", "--no-header", "--timeout=300"]

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
}  # fmt: skip


# -- mutants ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutant:
    path: str  #: from the root of the repository
    place: int  #: which of the file's nodes, in the order of `ast.walk`
    kind: int  #: which of the node's changes
    line: int
    text: str  #: the line, without what surrounds it
    change: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.change}: {self.text}"


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """(description, what takes the node's place), without annotations, which do nothing."""
    new: Any = copy.deepcopy(node)
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and (other := COMPARISONS.get(type(node.ops[0]))):
        new.ops = [other()]
        yield f"{ast.unparse(node)} -> {ast.unparse(new)}", new
    elif isinstance(node, ast.BinOp) and (operator := ARITHMETIC.get(type(node.op))):
        new.op = operator()
        yield f"{ast.unparse(node)} -> {ast.unparse(new)}", new
    elif isinstance(node, ast.BoolOp):
        new.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield f"{ast.unparse(node)} -> {ast.unparse(new)}", new
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield f"{ast.unparse(node)} -> {ast.unparse(node.operand)}", node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield f"{node.value} -> {not node.value}", ast.copy_location(ast.Constant(not node.value), node)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        for value in (node.value + 1, node.value - 1):
            yield f"{node.value} -> {value}", ast.copy_location(ast.Constant(value), node)


def _silent(tree: ast.AST) -> set[int]:
    """ids of nodes that do nothing in a run without errors: annotations, messages, raise, assert, `strict=`."""
    nodes: list[ast.AST] = []
    for node in ast.walk(tree):
        nodes += [x for x in (getattr(node, "annotation", None), getattr(node, "returns", None)) if x]
        if isinstance(node, ast.Raise | ast.JoinedStr | ast.Assert) or getattr(node, "arg", None) == "strict":
            nodes.append(node)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes.append(node)
    return {id(inner) for node in nodes for inner in ast.walk(node)}


def mutants() -> list[Mutant]:
    """All of them, in a fixed order."""
    found = []
    for path in sorted({p for pattern in SOURCES for p in ROOT.glob(pattern)}):
        source = path.read_text()
        lines, tree = source.splitlines(), ast.parse(source)
        silent = _silent(tree)
        for place, node in enumerate(ast.walk(tree)):
            if id(node) in silent or not hasattr(node, "lineno"):
                continue
            text = lines[node.lineno - 1].strip()
            for kind, (change, _) in enumerate(changes(node)):
                if isinstance(node, ast.Constant):  # a line often has several of one value
                    change += f" at column {node.col_offset - len(lines[node.lineno - 1]) + len(text)}"
                found.append(Mutant(str(path.relative_to(ROOT)), place, kind, node.lineno, text, change))
    return found


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> Any:
        return self.new if node is self.old else self.generic_visit(node)


def mutated(mutant: Mutant) -> Any:
    """The code of the mutant's module."""
    path = ROOT / mutant.path
    tree = ast.parse(path.read_text())
    node = list(ast.walk(tree))[mutant.place]
    new = [new for _, new in changes(node)][mutant.kind]
    return compile(ast.fix_missing_locations(_Replace(node, new).visit(tree)), str(path), "exec", dont_inherit=True)


# -- which tests reach which lines -------------------------------------------------------------------------------------


@dataclass
class Reach:
    tests: list[str]
    seconds: list[float]
    lines: dict[str, dict[int, list[int]]]  #: path -> line -> tests that run it; line 0: any line, after the imports
    modules: list[str]  #: of other packages, that the tests import


def state() -> str:
    """A hash of all sources and tests, without this file."""
    digest = hashlib.sha256()
    folders = ("fxpass", "passes", "runtime", "models", "tests")
    for path in sorted({p for folder in folders for p in (ROOT / folder).rglob("*.py")} - {Path(__file__).resolve()}):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def reach() -> Reach:
    """Recorded in a process of its own, where nothing of ours was imported yet."""
    path = CACHE / f"{state()}.json"
    if not path.exists():
        print("recording which tests reach which lines: once for this state of the sources, many minutes", flush=True)
        subprocess.run([sys.executable, "-m", "tests.mutants", "--record", str(path)], cwd=ROOT, check=True)
    loaded = json.loads(path.read_text())
    lines = {path: {int(line): tests for line, tests in found.items()} for path, found in loaded.pop("lines").items()}
    return Reach(lines=lines, **loaded)


def record(path: Path) -> None:
    import coverage

    CACHE.mkdir(parents=True, exist_ok=True)
    covered = coverage.Coverage(data_file=None, source=[str(ROOT / n) for n in ("fxpass", "passes", "runtime")])
    covered.start()
    import pytest

    tests: dict[str, float] = {}

    class Contexts:
        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
            covered.switch_context(item.nodeid)
            start = time.perf_counter()
            result = yield
            tests[item.nodeid] = time.perf_counter() - start
            covered.switch_context("")
            return result

    pytest.main([*TESTS, *[o for o in OPTIONS if o != "-x"], "--timeout=900"], plugins=[Contexts()])
    covered.stop()
    number = {name: i for i, name in enumerate(tests)}
    data, lines = covered.get_data(), {}
    for file in data.measured_files():
        found: dict[int, list[int]] = {}
        for line, contexts in data.contexts_by_lineno(file).items():
            found[line] = [number[c] for c in contexts if c in number]
        found[0] = sorted({i for of_line in found.values() for i in of_line})
        lines[str(Path(file).resolve().relative_to(ROOT))] = found
    modules = [n for n, m in sys.modules.items() if not str(getattr(m, "__file__", None) or ROOT).startswith(str(ROOT))]
    path.write_text(json.dumps({"tests": [*tests], "seconds": [*tests.values()], "lines": lines, "modules": modules}))


def tests_of(mutant: Mutant, known: Reach) -> list[list[str]]:
    """Those that reach its line, fastest first; all that reach its module, if no test is known to reach the line.

    The few files with the fastest tests come first, by themselves: to import all files takes longer than most tests.
    """
    lines = known.lines.get(mutant.path, {})
    found = lines.get(mutant.line) or lines.get(0, [])
    if mutant.path.startswith("runtime/"):
        found = {*found, *(i for i, name in enumerate(known.tests) if name.split("::")[0] in PROCESSES)}
    files: dict[str, list[int]] = {}
    for i in sorted(found, key=known.seconds.__getitem__):
        files.setdefault(known.tests[i].split("::")[0], []).append(i)
    ordered = sorted(files.values(), key=lambda tests: sum(map(known.seconds.__getitem__, tests)) / len(tests))
    parts = [[i for tests in part for i in tests] for part in (ordered[:5], ordered[5:])]
    return [[known.tests[i] for i in sorted(part, key=known.seconds.__getitem__)] for part in parts if part]


# -- running -----------------------------------------------------------------------------------------------------------


def run(mutant: Mutant | None, tests: list[str], limit: float, log: Path) -> str:
    """In a fork: "killed", "survived", or "late": those tests passed for which there was time."""
    child = os.fork()
    if child == 0:
        code = BROKEN
        with contextlib.suppress(BaseException):
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            code = _run_here(mutant, tests, limit)
        os._exit(code)
    end = time.monotonic() + 4 * limit + 120
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            if code in (NO_TESTS, BROKEN):
                raise RuntimeError(f"no test ran for {mutant}: see {log}")
            return {0: "survived", LATE: "late"}.get(code, "killed")
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return "killed"  # it hangs where no test's time limit can end it


def replace(mutant: Mutant) -> None:
    """Import the changed module in place of the original one, in this process."""
    path, code, original = ROOT / mutant.path, mutated(mutant), importlib.machinery.SourceFileLoader.get_code

    def get_code(self: Any, name: str) -> Any:
        return code if Path(self.path).resolve() == path else original(self, name)

    importlib.machinery.SourceFileLoader.get_code = get_code


def spent() -> float:
    """CPU seconds of this process and of those that it has waited for: what else the machine does has no part in it."""
    return sum(os.times()[:4])


def _run_here(mutant: Mutant | None, tests: list[str], limit: float) -> int:
    import pytest
    from hypothesis import Phase, settings

    if mutant is not None:
        replace(mutant)
        (CACHE / "sitecustomize.py").write_text(f"from tests.mutants import Mutant, replace\nreplace({mutant!r})\n")
        sys.path.insert(0, str(CACHE))
        os.environ["PYTHONPATH"] = os.pathsep.join([str(CACHE), str(ROOT), os.environ.get("PYTHONPATH", "")])

    order = {name: i for i, name in enumerate(tests)}

    def names(test: str) -> set[str]:
        return {test, test.split("[")[0], test.split("::")[0]}

    class Ordered:
        end = 0.0
        late = False

        def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
            named = [(order[n], item) for item in items for n in names(item.nodeid) if n in order]
            items[:] = [item for _, item in sorted(named, key=lambda pair: pair[0])]
            for item in items:
                function = getattr(item, "function", None)
                if (now := getattr(function, SETTINGS, None)) is not None:  # one failing example is enough: no search
                    setattr(function, SETTINGS, settings(now, phases=[Phase.explicit, Phase.generate]))
            self.end = spent() + limit

        def pytest_runtest_setup(self, item: pytest.Item) -> None:
            if spent() > self.end:
                self.late = True
                item.session.shouldstop = "no time is left"

    ordered = Ordered()
    files = sorted({name.split("::")[0] for name in tests})
    result = pytest.main([*files, *OPTIONS], plugins=[ordered])
    return LATE if ordered.late and result != pytest.ExitCode.TESTS_FAILED else int(result)


class Results:
    """What came of each mutant, kept on disk for one state of the sources and tests."""

    def __init__(self) -> None:
        self.path = CACHE / f"{state()}.results.json"
        self.known: dict[str, str] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def keep(self, mutant: Mutant, result: str) -> None:
        self.known[repr(mutant)] = result
        self.path.write_text(json.dumps(self.known, indent=0))


def reviewed() -> dict[tuple[str, str, str], str]:
    """(file, line, change) -> why no result changes."""
    entries = tomllib.loads(REVIEWED.read_text()).get("mutant", [])
    return {(entry["file"], entry["line"], entry["change"]): entry["reason"] for entry in entries}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", type=int, default=100, help="how many mutants")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--limit", type=float, default=150, help="CPU seconds of tests for each mutant")
    parser.add_argument("--match", default="", help="only mutants whose line of the report contains this")
    parser.add_argument("--skip", action="append", default=[], help="no mutants whose line contains this (repeatable)")
    parser.add_argument("--tests", nargs="+", help="run these files or tests, in place of those that reach the line")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.n < 1 or args.limit <= 0:
        parser.error("-n is a number of mutants and --limit one of CPU seconds: both are above 0")
    return args


def sample(args: argparse.Namespace) -> list[Mutant]:
    """A larger sample of the same seed starts with the smaller one."""
    everything = mutants()
    chosen = [m for m in everything if args.match in str(m) and not any(skip in str(m) for skip in args.skip)]
    random.Random(args.seed).shuffle(chosen)
    print(f"{min(args.n, len(chosen))} of {len(chosen)} mutants; {len(everything) - len(chosen)} others are left out")
    return chosen[: args.n]


def report(results: Counter[str]) -> int:
    print(", ".join(f"{results[name]} {name}" for name in ("killed", "survived", "late", "unreached", "reviewed")))
    killed, others = results["killed"], results["survived"] + results["late"] + results["unreached"]
    print(f"{100 * killed / max(1, killed + others):.1f} % of those that are not reviewed are killed")
    return int(killed < 0.95 * (killed + others))


def main() -> int:
    args = arguments()
    if args.record:
        record(args.record)
        return 0
    chosen, log, kept, why = sample(args), CACHE / "last.log", Results(), reviewed()
    CACHE.mkdir(parents=True, exist_ok=True)
    known = None if args.tests else reach()
    for name in known.modules if known else []:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    some = args.tests
    if known:
        quick = [name for name, seconds in zip(known.tests, known.seconds, strict=True) if seconds < 1]
        some = random.Random(0).sample(quick, min(20, len(quick)))
    if run(None, some, 600, log) != "survived":
        print(f"tests fail without any change: see {log}")
        return 1
    results = Counter[str]()
    for mutant in chosen:
        start = time.monotonic()
        parts = tests_of(mutant, known) if known else [args.tests]
        reason = why.get((mutant.path, mutant.text, mutant.change))
        result = "reviewed" if reason else "unreached" if not parts else known and kept.known.get(repr(mutant))
        if not result:
            ends = (run(mutant, part, args.limit, log) for part in parts)
            result = next((end for end in ends if end != "survived"), "survived")
            if known:
                kept.keep(mutant, result)
        results[result] += 1
        print(f"{result:9} {time.monotonic() - start:5.1f} s  {mutant}{f' ({reason})' if reason else ''}", flush=True)
    return report(results)


if __name__ == "__main__":
    sys.exit(main())
