"""Fold a graph by module: a tree of modules in which equal neighbours stand together, as `19 x TransformerBlock`.

Two modules are equal if they have the same operators on the same shapes, layouts and exchanges, wired alike. The order
in which a schedule places their nodes does not matter, nor do names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .record import Node, Snapshot

LISTED = 4  #: more modules are written as the first and the last
RUNS = ("operator", "exchange", "wait", "result")  #: kinds of nodes that run


@dataclass
class Block:
    """A module with the nodes that it runs, and groups of the modules inside, in the order in which they run."""

    path: str
    kind: str  #: class; "" if the program does not know it
    nodes: list[Node] = field(default_factory=list)  #: of the module itself
    groups: list[Group] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2]

    def inside(self) -> Iterator[Node]:
        """The nodes of the module and of all modules inside."""
        yield from self.nodes
        for group in self.groups:
            for block in group.blocks:
                yield from block.inside()


@dataclass
class Group:
    """Neighbours in one module that are equal; the first stands for all of them."""

    blocks: list[Block]
    like: str = ""  #: an earlier module, elsewhere, that is equal to these

    @property
    def first(self) -> Block:
        return self.blocks[0]

    @property
    def title(self) -> str:
        """`conv1`, `to_k, to_v`, or `transformer_blocks.0 … 18`, without the path of the module around them."""
        names = [block.name for block in self.blocks]
        if len(names) > LISTED or (len(names) > 1 and names[0].isdigit()):
            return f"{names[0]} … {names[-1]}"
        return ", ".join(names)


def opened(group: Group) -> tuple[str, Group]:
    """A group without the modules around it that hold nothing else; the title has their names."""
    title = group.title
    while len(group.blocks) == 1 and not group.like and not group.first.nodes and len(group.first.groups) == 1:
        (group,) = group.first.groups
        title = f"{title}.{group.title}"
    return title, group


def fold(snapshot: Snapshot) -> Block:
    """The tree of modules of a graph. Inputs, weights and outputs are left out."""
    root = _Tree("")
    place = {node.name: i for i, node in enumerate(snapshot.nodes)}
    for node in snapshot.nodes:
        if node.kind in RUNS:
            root.at(node.path).nodes.append(node)
    numbers = _Numbers(snapshot)
    seen: dict[Any, str] = {}
    root.sort(place)
    return _block(root, snapshot.modules, numbers, seen)


@dataclass
class _Tree:
    path: str
    nodes: list[Node] = field(default_factory=list)
    children: dict[str, _Tree] = field(default_factory=dict)

    def at(self, path: str) -> _Tree:
        tree = self
        for part in path.split(".") if path else ():
            inner = f"{tree.path}.{part}" if tree.path else part
            tree = tree.children.setdefault(part, _Tree(inner))
        return tree

    def inside(self) -> Iterator[Node]:
        yield from self.nodes
        for child in self.children.values():
            yield from child.inside()

    def sort(self, place: Mapping[str, int]) -> list[int]:
        """Order the modules inside by the middle of their nodes: a few may run early, on the model's inputs.

        Args:
            place: of each node in the order of execution.

        Returns: the places of all nodes inside.
        """
        inside = {name: sorted(child.sort(place)) for name, child in self.children.items()}
        ordered = sorted(self.children, key=lambda name: inside[name][len(inside[name]) // 2])
        self.children = {name: self.children[name] for name in ordered}
        return [place[node.name] for node in self.nodes] + [each for found in inside.values() for each in found]


class _Numbers:
    """Numbers that equal structures share."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.known: dict[Any, int] = {}

    def of(self, key: Any) -> int:
        return self.known.setdefault(key, len(self.known))

    def signature(self, nodes: Sequence[Node], path: str, kind: str) -> int:
        """The number of a module: of its class and of its nodes in any order, each with what it is computed from."""
        order = {node.name: node for node in nodes}
        found: dict[str, int] = {}

        def number(node: Node) -> int:
            if node.name in found:
                return found[node.name]
            stack = [node]
            while stack:
                top = stack[-1]
                missing = [order[each] for each in top.operands if each in order and each not in found]
                if missing:
                    stack += missing
                    continue
                stack.pop()
                sources = tuple(found[each] if each in found else self._outside(each, path) for each in top.operands)
                found[top.name] = self.of((self._form(top, path), sources))
            return found[node.name]

        return self.of((kind, tuple(sorted(number(node) for node in nodes))))

    def _form(self, node: Node, path: str) -> tuple[Any, ...]:
        some = [self.snapshot.by_id[each] for each in node.exchanges]
        sent = tuple((e.role, e.fresh, e.reason, e.text, e.exact, e.steady) for e in some)
        inner = node.path.removeprefix(path)
        call = (node.operator, node.arguments) if node.kind == "operator" else ()
        return (inner, node.kind, call, node.shape, node.local, node.dtype, node.layout, node.flops, sent)

    def _outside(self, name: str, path: str) -> int:
        """A value from outside the module; of its own weights, also which."""
        node = self.snapshot.by_name.get(name)
        if node is None:  # left out of what is shown
            return self.of("elsewhere")
        own = node.kind == "weight" and node.operator.startswith(f"{path}.")
        label = node.operator.removeprefix(path) if own else ""
        return self.of((label, node.shape, node.dtype, node.layout))


def _block(tree: _Tree, kinds: Mapping[str, str], numbers: _Numbers, seen: dict[Any, str]) -> Block:
    block = Block(tree.path, kinds.get(tree.path, ""), tree.nodes)
    last: int | None = None
    for child in tree.children.values():
        nodes = list(child.inside())
        number = numbers.signature(nodes, child.path, kinds.get(child.path, ""))
        if number == last:
            block.groups[-1].blocks.append(_block(child, kinds, numbers, {}))
            continue
        like = seen.setdefault(number, child.path) if len(nodes) > 2 else child.path
        made = _block(child, kinds, numbers, seen)
        block.groups.append(Group([made], like if like != child.path else ""))
        last = number
    return block
