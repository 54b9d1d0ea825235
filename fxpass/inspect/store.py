"""Snapshots as JSON, and back. `docs/inspect.md` documents the schema; `VERSION` is its version.

Each record is an object with the fields of its class. Layouts are listed once and referred to by their place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..ir.layout import Layout, Rows, Run
from .exchanges import Gathered
from .record import CutRecord, ExchangeRecord, MessageRecord, Node, Snapshot

SCHEMA = "fxpass.dump"
VERSION = 1  #: grows when a field is removed or changes its meaning; new fields do not count
RECORDS = {
    "cuts": CutRecord,
    "nodes": Node,
    "exchanges": ExchangeRecord,
    "messages": MessageRecord,
    "fallbacks": Gathered,
}


def to_json(snapshot: Snapshot) -> str:
    """The JSON text of a snapshot: one record a line."""
    layouts: dict[Layout, int] = {}

    def plain(value: Any) -> Any:
        return layouts.setdefault(value, len(layouts)) if isinstance(value, Layout) else value

    lines = {"schema": json.dumps(SCHEMA), "version": json.dumps(VERSION)}
    for each in fields(snapshot):
        value = getattr(snapshot, each.name)
        if each.name in RECORDS:
            records = ({f.name: plain(getattr(item, f.name)) for f in fields(item)} for item in value)
            lines[each.name] = _listed(json.dumps(item) for item in records)
        else:
            lines[each.name] = json.dumps(value)
    lines["layouts"] = _listed(json.dumps(from_layout(layout)) for layout in layouts)
    return "{\n" + ",\n".join(f'"{name}": {value}' for name, value in lines.items()) + "\n}"


def _listed(items: Any) -> str:
    text = ",\n ".join(items)
    return f"[\n {text}\n]" if text else "[]"


def from_json(text: str) -> Snapshot:
    """The snapshot that `to_json` wrote. Fields that this version does not know are left out.

    Raises:
        ValueError: the text is no dump, or one of another version of the schema.
    """
    data = read(text, SCHEMA, VERSION, "this dump", "this is no dump of fxpass")
    try:
        layouts = [to_layout(each) for each in data["layouts"]]
        values: dict[str, Any] = {
            each.name: tuple(_record(RECORDS[each.name], item, layouts) for item in data[each.name])
            if each.name in RECORDS
            else data[each.name]
            for each in fields(Snapshot)
        }
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"this dump is damaged: {type(error).__name__}: {error}") from None
    return Snapshot(**values)


def read(text: str, schema: str, version: int, what: str, otherwise: str) -> dict[str, Any]:
    """The object in a JSON text of a schema.

    Raises:
        ValueError: the text is something else (the message begins with `otherwise`), or of another version of the
            schema (the message calls it `what`).
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{otherwise}: {error}") from None
    if not isinstance(data, dict) or data.get("schema") != schema:
        raise ValueError(f'{otherwise}: "schema" is not "{schema}"')
    if data.get("version") != version:
        raise ValueError(f"{what} has version {data.get('version')} of the schema; this fxpass reads {version}")
    return data


def _record(kind: Any, data: Mapping[str, Any], layouts: list[Layout]) -> Any:
    values = {each.name: _value(data[each.name]) for each in fields(kind)}
    if values.get("layout") is not None:
        values["layout"] = layouts[values["layout"]]
    return kind(**values)


def _value(value: Any) -> Any:
    return tuple(map(_value, value)) if isinstance(value, list) else value


def from_layout(layout: Layout) -> dict[str, Any]:
    """A layout as JSON: its dim, and of each rank the runs (start, length, stride, count) of its rows."""
    rows = [[[run.start, run.length, run.stride, run.count] for run in part.runs] for part in layout.rows]
    return {"dim": layout.dim, "rows": rows}


def to_layout(data: Mapping[str, Any]) -> Layout:
    """The layout that `from_layout` wrote."""
    return Layout(data["dim"], tuple(Rows(tuple(Run(*run) for run in part)) for part in data["rows"]))
