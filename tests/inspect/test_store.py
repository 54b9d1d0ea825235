"""Snapshots as JSON."""

import json
from dataclasses import fields
from pathlib import Path

import pytest

from fxpass.inspect.record import ExchangeRecord, Node, Snapshot
from fxpass.inspect.store import RECORDS, VERSION, from_json, to_json
from fxpass.inspect.text import text
from tests.inspect.plans import planned, small


@pytest.mark.parametrize("strategy", ["sync", "displaced", "pcpp"])
def test_a_dump_as_json_loads_back_as_it_was(strategy: str) -> None:
    for made in (planned(strategy, 3).snapshot(rank=1), small("flux", 2, strategy).snapshot()):
        loaded = from_json(to_json(made))
        assert loaded == made
        assert text(loaded) == text(made)
        assert text(loaded, folded=False) == text(made, folded=False)


def test_json_is_plain_and_has_all_fields() -> None:
    data = json.loads(to_json(planned().snapshot()))
    assert data["schema"] == "fxpass.dump"
    assert data["version"] == VERSION == 1
    assert data.keys() == {"schema", "version", "layouts", *(each.name for each in fields(Snapshot))}
    assert all(node.keys() == {each.name for each in fields(Node)} for node in data["nodes"])
    assert all(each.keys() == {f.name for f in fields(ExchangeRecord)} for each in data["exchanges"])
    cut = data["layouts"][data["cuts"][0]["layout"]]
    assert cut == {"dim": 2, "rows": [[[0, 8, 0, 1]], [[8, 8, 0, 1]]]}


def test_the_documentation_lists_every_field() -> None:
    page = (Path(__file__).parents[2] / "docs" / "inspect.md").read_text()
    schema = page[page.index("## JSON") : page.index("## In Python")]
    for record in (Snapshot, *RECORDS.values()):
        missing = [each.name for each in fields(record) if f"`{each.name}`" not in schema]
        assert not missing, f"{record.__name__}: {missing}"


def test_nodes_of_exchanges_have_operators_as_others_do() -> None:
    nodes = planned("displaced").snapshot().nodes
    found = {(each.kind, each.operator) for each in nodes if each.kind in ("exchange", "wait", "result")}
    assert found == {("exchange", "exchange"), ("wait", "wait"), ("result", "getitem")}


def test_a_field_of_a_later_fxpass_is_left_out() -> None:
    made = planned().snapshot()
    data = json.loads(to_json(made))
    data["colour"] = "blue"
    data["nodes"][0]["colour"] = "red"
    assert from_json(json.dumps(data)) == made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2 of the schema; this fxpass reads 1"),
        ({"schema": "other"}, "no dump of fxpass"),
        ({"nodes": [{}]}, "damaged"),
        ({"layouts": []}, "damaged"),
    ],
)
def test_what_is_no_dump_of_this_version_is_refused(change: dict[str, object], message: str) -> None:
    data = json.loads(to_json(planned().snapshot())) | change
    with pytest.raises(ValueError, match=message):
        from_json(json.dumps(data))
    with pytest.raises(ValueError, match="no dump of fxpass"):
        from_json("{")
