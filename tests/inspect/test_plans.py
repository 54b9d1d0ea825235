"""Plans in Python: networkx graphs, differences, HTML."""

import re
import sys
from pathlib import Path
from typing import Any

import networkx as nx
import pytest

from fxpass.extras import MissingExtraError
from fxpass.make_plan import plan
from tests.inspect.plans import planned, small
from tests.runtime.plans import block, inputs


def test_the_networkx_graph_has_every_node_and_the_values_that_each_reads() -> None:
    made = planned()
    graph = made.to_networkx(rank=1)
    assert list(graph) == [node.name for node in made.graph.nodes]
    assert nx.is_directed_acyclic_graph(graph)
    for node in made.graph.nodes:
        assert {source.name for source in node.all_input_nodes} >= set(graph.predecessors(node.name))
    assert graph.graph["rank"] == 1
    convolution = graph.nodes["convolution_default_1"]
    assert (convolution["path"], convolution["split"], convolution["local"]) == ("down", 2, (2, 16, 4, 4))
    assert sum(graph.nodes[name]["flops"] for name in graph) == made.flops_per_rank[1]


def test_the_critical_path_of_a_graph_runs_through_its_exchanges() -> None:
    graph = planned().to_networkx()
    path = nx.dag_longest_path(graph, weight="seconds")
    assert nx.dag_longest_path_length(graph, weight="seconds") == pytest.approx(
        sum(graph.nodes[name]["seconds"] for name in path[:-1])
    )
    kinds = [graph.nodes[name]["kind"] for name in path]
    assert kinds.count("exchange") == kinds.count("wait") == 5


def test_the_calls_of_networkx_in_the_documentation_give_what_the_plan_knows() -> None:
    page = (Path(__file__).parents[2] / "docs" / "inspect.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"model": block(), "inputs": inputs(rows=32)}
    exec(code, names)
    made = plan(block(), *inputs(rows=32), world_size=4, strategy="displaced")
    assert names["exposed"] == sum(made.bytes_received(0, exact=False, exposed=True).values()) > 0
    assert sum(names["work"].values()) == made.flops_per_rank[0]
    assert names["work"]["down"] > 0
    assert names["graph"].nodes[names["slowest"][0]]["kind"] == "exchange"


def test_without_networkx_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "networkx", None)
    with pytest.raises(MissingExtraError, match=r'pip install "fxpass\[inspect\]"'):
        planned().to_networkx()


def test_a_plan_does_not_differ_from_itself() -> None:
    same = plan(block(), *inputs(), world_size=2)
    difference = planned().diff(same)
    assert not difference
    assert str(difference) == "the plans are equal"


def test_a_diff_lists_settings_cuts_and_exchanges() -> None:
    difference = planned().diff(planned("compressed", 3))
    assert {name for name, _, _ in difference.settings} >= {"ranks", "strategy", "bound", "flops_per_rank"}
    ((name, old, new),) = difference.cuts
    assert name == "x_sample"
    assert old != new
    changed = [(old, new) for old, new in difference.exchanges if old is not None and new is not None]
    assert all(old["node"] == new["node"] and old["role"] == new["role"] for old, new in changed)
    shown = str(difference)
    assert "ranks: 2 -> 3\n" in shown
    assert re.search(r"x3\.0 -> x\d\.0  halo for convolution_default_2: 1\.0 kB -> 2\.0 kB, then 256 B", shown)


def test_a_diff_lists_exchanges_that_only_one_plan_has() -> None:
    difference = planned().diff(planned(world=1))
    assert all(new is None for _, new in difference.exchanges)
    assert "6 exchanges fewer\n  - x0.0  moments for " in str(difference)
    assert "6 exchanges more\n  + x0.0  moments for " in str(planned(world=1).diff(planned()))


def test_a_long_diff_says_how_much_it_leaves_out() -> None:
    lines = str(small("unet_sd").diff(small("unet_sd", 1))).splitlines()
    assert sum(line.startswith("  - ") for line in lines) == 12
    assert f"  … {len(small('unet_sd').exchanges) - 12} more" in lines


def test_a_notebook_shows_a_plan_as_tables() -> None:
    html = planned("displaced")._repr_html_()
    assert html.count("<table>") == html.count("</table>") == 3
    assert "<td>x_sample</td>" in html
    assert "a displaced step" in html
    assert "a displaced step" not in planned()._repr_html_()
