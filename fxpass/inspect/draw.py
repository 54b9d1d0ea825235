"""A snapshot as a drawing: the folded graph in the dot language, or as SVG by Graphviz's program `dot`."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from .fold import RUNS, Block, Group, fold, opened
from .record import Node, Snapshot
from .words import bytes_text, count_text, flops_text

LIMIT = 60  #: of boxes; more cannot be read
MISSING = (
    "svg needs the program `dot` of Graphviz, which is not on the PATH: install it (apt install graphviz, brew install "
    "graphviz, or conda install graphviz), or use the format dot"
)
PLAIN, EXCHANGE, FALLBACK, OUTSIDE = "#ffffff", "#cfe2f7", "#f7c8c0", "#ececec"  #: colours of boxes
STYLE = """  graph [rankdir=TB, ranksep=0.35, nodesep=0.25, newrank=true, labelloc=t, fontsize=14];
  graph [fontname="Helvetica,Arial,sans-serif"];
  node [shape=box, style="filled,rounded", color="#55606b", margin="0.12,0.06", fontsize=10];
  node [fontname="Helvetica,Arial,sans-serif"];
  edge [color="#7c8894", arrowsize=0.6];"""
REPEATS = " [style=dashed, constraint=false]"
SHORTCUT = ' [constraint=false, color="#bcc4cb"]'
Edge = tuple[str, str]  #: from box to box


def graphviz() -> str:
    """The path of the program `dot`. Raises `FileNotFoundError` with how to install it if it is missing."""
    program = shutil.which("dot")
    if program is None:
        raise FileNotFoundError(MISSING)
    return program


def svg(snapshot: Snapshot, limit: int = LIMIT) -> str:
    """The drawing as SVG.

    Raises:
        FileNotFoundError: Graphviz is not installed; the message says how to install it.
        OSError: Graphviz fails.
    """
    program = graphviz()
    done = subprocess.run([program, "-Tsvg"], input=dot(snapshot, limit), capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{program} -Tsvg failed with exit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def dot(snapshot: Snapshot, limit: int = LIMIT) -> str:
    """The drawing in the dot language: modules as boxes, opened from the outside inwards up to `limit` boxes.

    Modules that exchange nothing stay closed. The operators of an open module itself are boxes, too. Blue boxes receive
    something from other ranks; red ones hold an operator that could not be split. An arrow stands for all values that
    go from one box to another; a dashed one leads to the next of equal modules that share a box.
    """
    drawing = _Drawing(snapshot, limit)
    title = f"{snapshot.model}, rank {snapshot.rank} of {snapshot.world}, after {snapshot.stage}".lstrip(", ")
    lines = ["digraph {", STYLE, f"  label={_quoted(title)};"]
    lines += drawing.lines()
    edges = drawing.edges()
    steps = drawing.steps(edges)
    for (a, b), repeats in edges.items():
        style = REPEATS if repeats else "" if (a, b) in steps else SHORTCUT
        lines.append(f"  {_quoted(a)} -> {_quoted(b)}{style};")
    return "\n".join([*lines, "}"])


class _Drawing:
    def __init__(self, snapshot: Snapshot, limit: int) -> None:
        self.snapshot = snapshot
        self.root = fold(snapshot)
        self.alias: dict[str, str] = {}  #: path of a module -> path of the equal one that is drawn for it
        self.fallen = {each for gathered in snapshot.fallbacks for each in gathered.exchanges}
        self._visits: dict[tuple[str, bool], dict[str, int]] = {}
        _note_aliases(self.root, self.alias)
        self.ends = [node for node in snapshot.nodes if node.kind in ("input", "output")]
        self.open = {""}
        self._expand(limit - len(self.ends))

    def _expand(self, room: int) -> None:
        """Open modules, the outermost first and among them the largest, while the boxes fit."""
        room -= self._boxes(self.root)
        level = [self.root]
        while level:
            inner = [group.first for block in level for group in block.groups if not group.like]
            level = []
            for block in sorted(inner, key=lambda b: -sum(1 for _ in b.inside())):
                if self._worth_opening(block) and self._boxes(block) - 1 <= room:
                    room -= self._boxes(block) - 1
                    self.open.add(block.path)
                    level.append(block)

    def _worth_opening(self, block: Block) -> bool:
        """Whether a module has others inside and exchanges, if there are exchanges at all."""
        some = not self.snapshot.exchanges or any(node.kind == "exchange" for node in block.inside())
        return bool(block.groups) and some

    def _boxes(self, block: Block) -> int:
        """How many boxes an open module has."""
        return sum(len(self._parts(group.first)) for group in block.groups) + len(self._own(block))

    def _own(self, block: Block) -> dict[int, list[Node]]:
        """The nodes of an open module itself, by visit."""
        return _by_visit(block.nodes, self.visits(block.path, inside=False))

    def _parts(self, block: Block) -> dict[int, list[Node]]:
        """All nodes of a closed module, by visit."""
        return _by_visit(block.inside(), self.visits(block.path, inside=True))

    def visits(self, path: str, inside: bool) -> dict[str, int]:
        """For each node of a module, how often values have left the module and come back before they reach it.

        Nodes of different visits are in different boxes, so that few arrows lead back. What does not depend on these
        values belongs to the last visit that it can.

        Args:
            inside: nodes of the modules inside are nodes of the module.
        """
        key = path, inside
        if key not in self._visits:
            around = f"{path}." if path else ""
            own = {
                node.name
                for node in self.snapshot.nodes
                if node.kind in RUNS and (node.path == path or (inside and node.path.startswith(around)))
            }
            left = dict.fromkeys(own, 0)  #: visits that follow that of a node, also for nodes that lead to the module
            for node in reversed(self.snapshot.nodes):
                if node.name in left:
                    for each in node.operands:
                        returns = each in own and node.name not in own
                        left[each] = max(left.get(each, 0), left[node.name] + returns)
            last = max((left[name] for name in own), default=0)
            self._visits[key] = {name: last - left[name] for name in own}
        return self._visits[key]

    def key(self, node: Node) -> str:
        """The box that a node is in."""
        return self._place(node)[0]

    def _place(self, node: Node) -> tuple[str, bool]:
        """The box that a node is in, and whether that is drawn for its own module, not for an equal one."""
        if node.kind in ("input", "output"):
            return node.name, True
        own = path = ""
        for part in node.path.split(".") if node.path else ():
            own, path = (f"{each}.{part}" if each else part for each in (own, path))
            path = self.alias.get(path, path)
            if path not in self.open:
                return _of_module(path, self.visits(own, inside=True)[node.name]), own == path
        return f"part {self.visits(own, inside=False)[node.name]} of {path}", own == path

    def lines(self) -> Iterator[str]:
        for node in self.ends:
            title = node.operator if node.kind == "input" else "output"
            yield f"  {_quoted(node.name)} [label={_quoted(title)}, fillcolor={_quoted(OUTSIDE)}];"
        yield from self._inside(self.root, "  ")

    def _inside(self, block: Block, indent: str) -> Iterator[str]:
        for visit, nodes in self._own(block).items():
            counted = Counter(node.operator for node in nodes if node.kind == "operator").most_common(3)
            names = ", ".join(f"{name} x {n}" if n > 1 else name for name, n in counted)
            yield indent + self._box(f"part {visit} of {block.path}", names or "exchanges", nodes)
        for group in block.groups:
            yield from self._group(group, indent)

    def _opened(self, group: Group) -> tuple[str, Group]:
        return opened(group) if group.first.path in self.open else (group.title, group)

    def _group(self, group: Group, indent: str) -> Iterator[str]:
        names, group = self._opened(group)
        block, count = group.first, len(group.blocks)
        title = f"{count} x {block.kind or 'module'}\n{names}" if count > 1 else f"{names}  {block.kind}".rstrip()
        if block.path not in self.open:
            parts = self._parts(block)
            for visit, nodes in parts.items():
                more = f"\npart {visit + 1} of {len(parts)}" if len(parts) > 1 else ""
                yield indent + self._box(_of_module(block.path, visit), f"{title}{more}", nodes)
            return
        yield f"{indent}subgraph {_quoted(f'cluster {block.path}')} {{"
        yield f'{indent}  label={_quoted(title)}; fontsize=11; color="#aab4be"; style="rounded";'
        yield from self._inside(block, indent + "  ")
        yield f"{indent}}}"

    def _box(self, key: str, title: str, nodes: list[Node]) -> str:
        operators = [node for node in nodes if node.kind == "operator"]
        ids = [each for node in nodes if node.kind == "exchange" for each in node.exchanges]
        work = sum(node.flops for node in operators)
        parts = [count_text(len(operators), "operator"), *([flops_text(work)] if work else [])]
        lines = [title, ", ".join(parts)] if operators or not ids else [title]
        for role in dict.fromkeys(self.snapshot.by_id[each].role for each in ids):
            some = [self.snapshot.by_id[each] for each in ids if self.snapshot.by_id[each].role == role]
            size = bytes_text(sum(each.exact[self.snapshot.rank] for each in some))
            names = [each.id for each in some]
            shown = ", ".join(names) if len(names) < 4 else f"{names[0]} … {names[-1]}"
            lines.append(f"{role} {shown}: {size}")
        colour = FALLBACK if self.fallen.intersection(ids) else EXCHANGE if ids else PLAIN
        return f"{_quoted(key)} [label={_quoted(chr(10).join(lines))}, fillcolor={_quoted(colour)}];"

    def edges(self) -> dict[Edge, bool]:
        """From box to box, each once, in the order of the graph; whether all values go to the next of equal modules."""
        found: dict[Edge, bool] = {}
        for node in self.snapshot.nodes:
            if node.kind not in ("weight", "constant"):
                to = self.key(node)
                for name in node.operands:
                    source = self.snapshot.by_name.get(name)
                    if source is not None and source.kind not in ("weight", "constant"):
                        edge = self.key(source), to
                        found[edge] = found.get(edge, True) and self._repeats(source, node)
        return {(a, b): repeats for (a, b), repeats in found.items() if a != b}

    def steps(self, edges: Iterable[Edge]) -> set[Edge]:
        """The edges that lead to a box that ends later, and past no other box that they could lead through."""
        import networkx

        ends: dict[str, int] = {}
        for i, node in enumerate(self.snapshot.nodes):
            if node.kind not in ("weight", "constant"):
                box, drawn = self._place(node)
                if drawn or box not in ends:
                    ends[box] = i
        forward = networkx.DiGraph([(a, b) for a, b in edges if ends[a] < ends[b]])
        return set(networkx.transitive_reduction(forward).edges)

    def _repeats(self, source: Node, node: Node) -> bool:
        """Whether a value goes from one of equal neighbours to another one."""
        if not source.path or not node.path:
            return False
        for a, b in zip(_around(source.path), _around(node.path), strict=False):
            if a != b:
                return self.alias.get(a, a) == self.alias.get(b, b)
        return False


def _of_module(path: str, visit: int) -> str:
    """The box of a closed module."""
    return f"module {path}, visit {visit}" if visit else f"module {path}"


def _by_visit(nodes: Iterable[Node], visits: Mapping[str, int]) -> dict[int, list[Node]]:
    found: dict[int, list[Node]] = {}
    for node in nodes:
        found.setdefault(visits[node.name], []).append(node)
    return dict(sorted(found.items()))


def _around(path: str) -> list[str]:
    """The paths of a module and of those around it, the outermost first."""
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


def _note_aliases(block: Block, alias: dict[str, str]) -> None:
    for group in block.groups:
        for other in group.blocks[1:]:
            alias[other.path] = group.first.path
        _note_aliases(group.first, alias)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
