"""Explain a node: its rule, where its split comes from, its exchanges, and what the search for cuts tried."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import import_module
from itertools import pairwise

from torch import fx

from ..ir.exchange import DISPLACED
from ..ir.layout import Layout
from ..ir.program import Program
from ..ir.strategy import Strategy
from ..passes.cuts import Tried
from ..passes.narrow import WITHOUT
from ..passes.rules import RULES
from .record import ExchangeRecord, Node, Snapshot
from .text import WHOLE_MODEL, call_text, cut_texts, placed_text
from .words import bytes_text, count_text, layout_text, seconds_text

WHY = {
    "halo": "the operator's window reaches rows that other ranks hold",
    "keys_values": "the rank's queries attend to the keys and values of all ranks",
    "moments": "mean and variance are those of the rows of all ranks",
    "sum": "the operator reduces the split dim, and each rank has the result of its own rows",
    "realign": "the operator needs other rows than the rank holds, so that its operands fit together",
    "rebalance": "the rows are divided anew, because a rank would have none or because a value inside the model is cut",
    "small": "every rank needs the whole value, and all must have the same bits",
    "fallback": "the operator cannot be split, so that every rank runs it on whole operands",
    "output": "the caller gets the whole output on every rank",
    "inputs": "rank 0 has the inputs",
    "transfer": "another stage of the model reads the value",
}  #: why exchanges of a role exist
FRESH = {
    "stale": "displaced steps use what the other ranks sent at the last step",
    "predicted": "displaced steps use an estimate from what the other ranks sent at earlier steps and the own change",
    "corrected": "displaced steps use what the other ranks sent at the last step, moved by the own change since then",
    "frozen": "displaced steps use what the other ranks sent at the last exact step",
    "local": "displaced steps use the rank's own part alone",
}


def explain(program: Program, snapshot: Snapshot, name: str, strategy: Strategy, tried: Sequence[Tried] = ()) -> str:
    """Why the node `name` is as it is.

    Args:
        program: the normalized program of `snapshot`.
        snapshot: of the last pass.
        name: a node of the graph, an operator of the captured program, or an exchange (`x3.1`).
        tried: what the search for cuts tried.

    Raises:
        ValueError: nothing has this name; the message suggests near ones.
    """
    return "\n".join(_Explainer(program, snapshot, strategy, tried).lines(name))


class _Explainer:
    def __init__(self, program: Program, snapshot: Snapshot, strategy: Strategy, tried: Sequence[Tried]) -> None:
        self.snapshot = snapshot
        self.strategy = strategy
        self.tried = tried
        self.captured: dict[str, fx.Node] = {node.name: node for node in program.graph.nodes}

    def lines(self, name: str) -> Iterator[str]:
        node = self._found(name)
        yield from self._what(node)
        if node.layout is not None:
            yield f"layout    {placed_text(node, self.snapshot.rank).strip()}"
        yield from self._rule(node)
        if node.layout is not None:
            yield from self._split(node)
        exchanges = self._exchanges(node, name)
        for each in exchanges:
            yield from self._exchange(each)
        if not exchanges:
            yield "exchange  none: each rank has all rows that it needs"
        for gathered in self.snapshot.fallbacks:
            if gathered.node == node.origin:
                yield f"fallback  {gathered}"
                yield "          a rule for this operator would split it (CONTRIBUTING.md)"
        yield from self._search()

    def _found(self, name: str) -> Node:
        """The node that a name stands for; of several nodes from one operator, the last."""
        if name in self.snapshot.by_id:
            each = self.snapshot.by_id[name]
            return self.snapshot.by_name[each.result or each.node]
        if name in self.snapshot.by_name:
            return self.snapshot.by_name[name]
        made = [n for n in self.snapshot.nodes if n.origin == name or (n.kind == "input" and n.operator == name)]
        if made:
            return made[-1]
        known = {*self.snapshot.by_name, *self.snapshot.by_id, *(node.origin for node in self.snapshot.nodes)}
        near = difflib.get_close_matches(name, sorted(known), n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"no node is called {name!r}; {hint}`fxpass dump MODEL --unfold` lists the nodes")

    def _what(self, node: Node) -> Iterator[str]:
        what = {"operator": call_text(node, self.snapshot), "result": "the result of an exchange"}
        yield f"{node.name}: {what.get(node.kind, node.kind)}"
        trace = self.captured[node.origin].meta.get("trace", "") if node.origin in self.captured else ""
        yield f"from      {node.path or WHOLE_MODEL}" + (f", {trace}" if trace else "")

    def _rule(self, node: Node) -> Iterator[str]:
        source = self.captured.get(node.origin)
        if source is None or source.op != "call_function":
            return
        rule = RULES.get(source.target)
        operands = [self.snapshot.by_name[each] for each in node.operands if each in self.snapshot.by_name]
        gathered = any(each.node == node.origin for each in self.snapshot.fallbacks)
        if gathered:
            yield f"rule      none that fits; {source.target} runs whole on every rank"
        elif not node.exchanges and not any(
            each.layout is not None and each.layout.split for each in (*operands, node)
        ):
            yield "rule      none was needed: its operands are whole on every rank, where it runs unchanged"
        elif rule is None:
            yield f"rule      none for {source.target}: the operators of which torch makes it were split instead"
        else:
            rule = rule.func if isinstance(rule, partial) else rule
            name = rule.__qualname__.partition(".")[0]  # of a rule that a function has made, this function
            said = (inspect.getdoc(getattr(import_module(rule.__module__), name)) or "").partition("\n")[0]
            yield f"rule      `{name}` of {rule.__module__} for {source.target}" + (f": {said}" if said else "")

    # -- the split ------------------------------------------------------------------------------------------------

    def _split(self, node: Node) -> Iterator[str]:
        assert node.layout is not None
        if not node.layout.split:
            yield "split     not split: every rank has all of it"
            return
        chain = [node]
        while (source := self._source(chain[-1])) is not None:
            chain.append(source)
        first = chain[-1]
        cut = next((each for each in self.snapshot.cuts if each.node in (first.origin, *first.operands)), None)
        if cut is not None:
            layout, rows = cut_texts(cut)
            yield f"split     comes from the cut of {cut.label}: {layout}, {rows}"
        else:
            yield f"split     begins at {first.name} in {first.path or WHOLE_MODEL}: {call_text(first, self.snapshot)}"
        places = [layout_text(each.shape or (), each.layout) for each in reversed(chain) if each.layout is not None]
        names = [each.name for each in reversed(chain) if each.layout is not None]
        turns = [f"{now} at {name}" for (old, now), name in zip(pairwise(places), names[1:], strict=True) if now != old]
        if len(chain) > 1:
            yield f"          over {count_text(len(chain) - 1, 'operator')}" + (
                f", which move it to {', then '.join(turns)}" if turns else ""
            )

    def _source(self, node: Node) -> Node | None:
        """The split operand from which a node has its layout; None where the split begins."""
        if node.kind == "result":
            each = self.snapshot.by_id[node.exchanges[0]]
            here = each.operand in self.snapshot.by_name  # else another stage sends it
            operands = [self.snapshot.by_name[each.operand]] if here else []
        else:
            operands = [self.snapshot.by_name[each] for each in node.operands]
        split = [each for each in operands if each.layout is not None and each.layout.split]
        same = [each for each in split if each.layout == node.layout]
        return next(iter([*same, *split]), None)

    # -- exchanges ------------------------------------------------------------------------------------------------

    def _exchanges(self, node: Node, name: str) -> list[ExchangeRecord]:
        """The exchange itself, or those whose results the node reads or that its operator needs."""
        if name in self.snapshot.by_id:
            return [self.snapshot.by_id[name]]
        if node.exchanges:
            return [self.snapshot.by_id[each] for each in node.exchanges]
        return [
            each
            for each in self.snapshot.exchanges
            if each.result in node.operands or (node.kind == "operator" and each.origin == node.origin)
        ]

    def _exchange(self, each: ExchangeRecord) -> Iterator[str]:
        rank = self.snapshot.rank
        yield f"exchange  {each.id}: {each.text} of {each.operand} for {each.origin}; rank {rank} receives " + (
            f"{bytes_text(each.exact[rank])} in an exact step, {bytes_text(each.steady[rank])} in a displaced one"
            if each.exact != each.steady
            else bytes_text(each.exact[rank])
        )
        yield f"          because {WHY[each.role]}" + (f": {each.reason}" if each.reason else "")
        yield f"          {self._staleness(each)}"

    def _staleness(self, each: ExchangeRecord) -> str:
        if not each.may_be_stale:
            if each.role == "transfer":
                return "never stale: this is an output, or the timestep decides it and not the sample"
            if each.role in DISPLACED:
                return "never stale: with old rows, the result of this operator would not stay close to the exact one"
            return f"never stale: exchanges of the role {each.role} are exact in every step"
        if each.fresh == "sync":
            return f"may be stale: its rule allows it, but the strategy {self.strategy.name!r} keeps {each.role} fresh"
        if each.fresh == "frozen" and each.reason.startswith(WITHOUT):
            return f"frozen: {FRESH['frozen']}; {self.strategy.name!r} wants own tokens alone, which needs a window"
        if each.fresh == "frozen" and self.strategy.freshness(each.role) != "frozen":  # type: ignore[arg-type]
            return (
                "sent in exact steps only: the value depends on the conditioning alone, and is the same at every step"
            )
        return f"{each.fresh}: {FRESH[each.fresh]}, as the strategy {self.strategy.name!r} wants and the rule allows"

    # -- the search -----------------------------------------------------------------------------------------------

    def _search(self) -> Iterator[str]:
        if not self.tried:
            return
        yield f"search    tried {count_text(len(self.tried), 'set')} of cuts:"
        yield "          evenness  received  compute    exchanges  cuts"
        chosen = {cut.node: cut.layout for cut in self.snapshot.cuts}
        for each in self.tried:
            mark = "chosen" if dict(each.cuts) == chosen else ""
            cuts = "; ".join(self._tried(name, layout) for name, layout in each.cuts)
            yield (
                f"  {mark:6}  {each.evenness:<8.0%}  {bytes_text(each.received):8}  {seconds_text(each.compute):9}  "
                f"{seconds_text(each.exchange):9}  {cuts}"
            )

    def _tried(self, name: str, layout: Layout) -> str:
        """`x_sample [B, C, H/2, W] of 8 rows a rank`."""
        least, most = min(layout.sizes), max(layout.sizes)
        rows = f"{least} to {most}" if least < most else str(most)
        return f"{name} {layout_text(self.captured[name].meta['shape'], layout)} of {rows} rows a rank"
