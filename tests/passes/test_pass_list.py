"""The list of passes: each does what its name says, to a graph of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import fx

import fxpass
from fxpass.ir.layout import Layout, even
from fxpass.ir.program import fingerprint, layout_of
from fxpass.ir.strategy import Strategy
from fxpass.models.small import case
from fxpass.passes import PASSES, Build, build, resume
from fxpass.passes.targets import find

NAMES = [each.name for each in PASSES]


def printed(graph: fx.Graph) -> list[Any]:
    """All that a graph holds, as text."""
    return [
        (node.format_node(), repr(node.args), sorted((k, repr(v)) for k, v in node.meta.items()))
        for node in graph.nodes
    ]


def initial(name: str, strategy: str) -> Build:
    chosen = case(name)
    model: Any = chosen.build()
    program = fxpass.capture(model, **chosen.inputs(rows=32, seed=0, module=model))
    return Build(program, 2, find("cpu"), Strategy.of(strategy))


@pytest.mark.parametrize("strategy", ["displaced", "pcpp"])
@pytest.mark.parametrize("name", ["unet_sd", "flux", "cogvideox_5b"])
def test_a_pass_leaves_the_graph_it_is_given_as_it_was(name: str, strategy: str) -> None:
    state = initial(name, strategy)
    for each in PASSES:
        given = state.current
        before = printed(given)
        state = each.run(state)
        assert printed(given) == before, each.name


def test_each_pass_of_the_list_comes_after_the_one_whose_graph_it_needs() -> None:
    cut = ["normalize", "samples", "cuts", "partition", "trim"]
    assert [*cut, "displace", "narrow", "bucket", "join", "stages", "schedule"] == NAMES


@pytest.mark.parametrize("name", ["unet_sd", "flux"])
def test_partition_and_trim_make_what_the_search_kept_of_its_winner(name: str) -> None:
    state = initial(name, "sync")
    for each in PASSES[: NAMES.index("cuts") + 1]:
        state = each.run(state)
    assert state.graph is None
    forgetful = replace(state, best=None)
    for each in PASSES[NAMES.index("partition") : NAMES.index("trim") + 1]:
        state, forgetful = each.run(state), each.run(forgetful)
        assert state.graph is not forgetful.graph
        assert fingerprint(state.current) == fingerprint(forgetful.current)


def test_partition_cuts_where_the_build_says_although_the_search_chose_otherwise() -> None:
    state = initial("unet_sd", "sync")
    for each in PASSES[: NAMES.index("cuts") + 1]:
        state = each.run(state)
    (name,) = [name for name in state.cuts if state.program.inputs[0] == name]
    columns = Layout(3, even(16, 2))
    assert state.cuts[name] != columns
    state = PASSES[NAMES.index("partition")].run(replace(state, cuts={name: columns}))
    assert columns in {layout_of(node) for node in state.current.nodes}


def test_a_build_stops_after_the_pass_that_is_named_and_goes_on_from_there() -> None:
    start = initial("flux", "displaced")
    whole = build(start.program, 2, start.target, start.strategy)
    for name in NAMES:
        state = build(start.program, 2, start.target, start.strategy, after=name)
        ran = [each for each in NAMES if each in state.program.seconds]
        assert ran == NAMES[: NAMES.index(name) + 1]
        assert fingerprint(resume(state, after=name).current) == fingerprint(whole.current)


def test_an_unknown_pass_is_refused_with_the_names_of_those_there_are() -> None:
    state = initial("unet_sd", "sync")
    with pytest.raises(ValueError, match=r"no pass is called 'seed'.*normalize, samples, cuts, partition, trim"):
        build(state.program, 2, state.target, state.strategy, after="seed")
