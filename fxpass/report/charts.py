"""The charts of a report, as Vega-Lite specifications. Their texts take the colour of the page, so that they fit both
light and dark ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import altair as alt

from ..inspect.record import CutRecord
from ..inspect.words import bytes_text, flops_text, seconds_text
from ..ir.mesh import Mesh
from .facts import Bar, Facts, Part

NARROW = 0.002  #: modules below this share of the time are left out of the map
LETTER = 6.4  #: pixels of a letter in the map
STRIPES = 400  #: runs of rows that the picture of a cut has at most
HUES = "tableau10"
CONFIG: dict[str, Any] = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": dict.fromkeys(("labelColor", "titleColor", "domainColor", "tickColor"), "currentColor")
    | {"gridColor": "currentColor", "gridOpacity": 0.15, "labelFontSize": 12, "titleFontSize": 12, "labelLimit": 220},
    "legend": {"labelColor": "currentColor", "titleColor": "currentColor", "orient": "top", "labelFontSize": 12}
    | {"columns": 2, "labelLimit": 260, "symbolLimit": 64},
}


def charts(facts: Facts) -> dict[str, dict[str, Any]]:
    """The specifications, by the id of the element that each is drawn in."""
    makers: dict[str, Callable[[Facts], alt.TopLevelMixin | None]] = {
        "strips": strips,
        "map": module_map,
        "roles": roles,
        "memory": memory,
        "alternatives": alternatives,
    }
    made = {name: maker(facts) for name, maker in makers.items()}
    names = facts.plan.placement.names
    made |= {f"timeline-{name.split()[0]}": timeline(bars, names) for name, bars in facts.timelines.items()}
    return {name: _finished(each) for name, each in made.items() if each is not None}


def _finished(chart: Any) -> dict[str, Any]:
    return (
        chart.properties(width="container", autosize=alt.AutoSizeParams(type="fit-x", contains="padding"))
        .configure(**CONFIG)
        .to_dict()
    )


def _data(rows: Iterator[dict[str, Any]] | list[dict[str, Any]]) -> alt.Data:
    return alt.Data(values=list(rows))


def strips(facts: Facts) -> alt.TopLevelMixin | None:
    """Which rows of each value that is cut are on which rank."""
    cuts = facts.snapshot.cuts
    rows = [row for cut in cuts for row in _strips(cut, facts.plan.mesh)]
    if not rows:
        return None
    base = alt.Chart(_data(rows), height=min(480, max(180, 26 * facts.plan.world_size)))
    x = alt.X("cut:N", sort=[cut.label for cut in cuts], title=None, axis=alt.Axis(labelAngle=0, orient="top"))
    y = alt.Y("begin:Q", title=None, scale=alt.Scale(domain=[1, 0], nice=False), axis=None)
    blocks = base.mark_rect(stroke="white", strokeWidth=1, tooltip=True).encode(
        x=x,
        y=y,
        y2="end:Q",
        color=alt.Color("rank:O", scale=_hues(facts), legend=None),
        tooltip=["cut:N", "ranks:N", "rows:N"],
    )
    names = base.mark_text(color="white", fontWeight="bold").encode(x=x, y="middle:Q", text="label:N")
    return blocks + names


def _strips(cut: CutRecord, mesh: Mesh) -> Iterator[dict[str, Any]]:
    size = cut.shape[cut.layout.axis]
    runs = [
        (rank, run.start + i * run.stride, run.length)
        for rank, part in enumerate(cut.layout.rows)
        for run in part.runs
        for i in range(run.count)
    ]
    for rank, start, length in runs[:STRIPES]:
        begin, end = start / size, (start + length) / size
        rows = f"{start} to {start + length - 1} of {size}"
        holders = range(rank, mesh.world, mesh.patches)
        name = f"rank{'s' * (len(holders) > 1)} {', '.join(map(str, holders))}"
        label = name if end - begin > 0.03 and len(runs) <= 64 else ""
        yield {"cut": cut.label, "rank": rank, "ranks": name, "rows": rows, "begin": begin, "end": end} | {
            "middle": (begin + end) / 2, "label": label
        }  # fmt: skip


def _hues(facts: Facts) -> alt.Scale:
    return alt.Scale(scheme=HUES if facts.plan.world_size <= 10 else "rainbow")


def module_map(facts: Facts) -> alt.TopLevelMixin | None:
    """The modules as boxes, each below the one around it and as wide as its share of the time."""
    shown = [part for part in facts.parts if part.end - part.start >= NARROW]
    if len(shown) < 2:
        return None
    whole = shown[0]
    wanted = alt.param(
        name="shown",
        value="compute",
        bind=alt.binding_radio(options=["compute", "bytes", "state"], name="Colour: share of the model's "),
    )
    base = (
        alt.Chart(_data([_box(part, whole) for part in shown]), height=34 * (1 + max(part.depth for part in shown)))
        .add_params(wanted)
        .transform_calculate(
            share="datum[shown]",
            fitting=f"(datum.end - datum.start) * width > {LETTER} * length(datum.label) ? datum.label : ''",
        )
    )
    x = alt.X("start:Q", axis=None, scale=alt.Scale(domain=[0, 1], nice=False))
    y = alt.Y("depth:O", axis=None)
    boxes = base.mark_rect(stroke="white", strokeWidth=0.4).encode(
        x=x,
        x2="end:Q",
        y=y,
        color=alt.Color("share:Q", scale=alt.Scale(scheme="blues", domain=[0, 1], type="sqrt"), legend=None),
        tooltip=["module:N", "class:N", "time:N", "work:N", "received:N", "kept:N"],
    )
    names = base.mark_text(fontSize=11).encode(
        x=alt.X("middle:Q"),
        y=y,
        text="fitting:N",
        color=alt.condition("datum.share > 0.25", alt.value("white"), alt.value("#10253a")),
    )
    return boxes + names


def _box(part: Part, whole: Part) -> dict[str, Any]:
    return {
        "module": part.path or "the model",
        "class": part.kind,
        "label": part.name or part.kind or "the model",
        "depth": part.depth,
        "start": round(part.start, 5),
        "end": round(part.end, 5),
        "middle": round((part.start + part.end) / 2, 5),
        "compute": _share(part.flops, whole.flops),
        "bytes": _share(part.received, whole.received),
        "state": _share(part.state, whole.state),
        "time": seconds_text(part.seconds),
        "work": flops_text(part.flops),
        "received": bytes_text(part.received),
        "kept": bytes_text(part.state),
    }


def _share(count: float, whole: float) -> float:
    return round(count / whole, 5) if whole else 0.0


def roles(facts: Facts) -> alt.TopLevelMixin | None:
    """What each rank receives in a step, by the role of the exchanges."""
    plan = facts.plan
    displaced = plan.bytes_received_per_rank_displaced or ()
    steps = {"exact": plan.bytes_received_per_rank, "displaced": displaced}
    rows = [
        {"step": name, "rank": f"rank {rank}", "role": role, "bytes": size, "size": bytes_text(size)}
        for name, ranks in steps.items()
        for rank, received in enumerate(ranks)
        for role, size in received.items()
    ]
    if not any(row["bytes"] for row in rows):
        return None
    chart = alt.Chart(_data(rows), height=(22 if plan.world_size <= 16 else 12) * plan.world_size)
    if displaced:
        bind = alt.binding_radio(options=["exact", "displaced"], name="Step: ")
        chart = chart.add_params(alt.param(name="step", value="exact", bind=bind)).transform_filter(
            "datum.step == step"
        )
    return chart.mark_bar().encode(
        x=alt.X("bytes:Q", title="bytes received", axis=alt.Axis(format="~s", tickCount=5)),
        y=alt.Y("rank:N", title=None, sort=[f"rank {rank}" for rank in range(plan.world_size)]),
        color=alt.Color("role:N", title=None, scale=alt.Scale(scheme=HUES)),
        tooltip=["rank:N", "role:N", "size:N"],
    )


def timeline(bars: list[Bar], names: Sequence[str]) -> alt.TopLevelMixin | None:
    """What each process does in a step: a lane for its kernels, and one for messages on their way to it."""
    if not bars:
        return None
    shown = [names[process] for process in sorted({bar.process for bar in bars})]
    rows = [
        {
            "process": names[bar.process],
            "lane": bar.lane,
            "what": bar.what,
            "name": bar.name or "the model",
            "began": round(bar.began * 1e3, 4),
            "ended": round(bar.ended * 1e3, 4),
            "took": seconds_text(bar.ended - bar.began),
        }
        for bar in bars
    ]
    colours = {
        "computing": "#4c78a8",
        "waiting": "#e45756",
        "message": "#f2a93b",
        "message for next step": "#9d9ba3",
    }
    used = [name for name in colours if any(bar.what == name for bar in bars)]
    return (
        alt.Chart(_data(rows), height=14 * len({(bar.process, bar.lane) for bar in bars}) + 4 * len(shown))
        .mark_rect()
        .encode(
            x=alt.X("began:Q", title="milliseconds", axis=alt.Axis(tickCount=8), scale=alt.Scale(nice=False)),
            x2="ended:Q",
            y=alt.Y("process:N", title=None, sort=shown, scale=alt.Scale(paddingInner=0.3)),
            yOffset=alt.YOffset("lane:N", sort=["compute", "messages"]),
            color=alt.Color("what:N", title=None, scale=alt.Scale(domain=used, range=[colours[name] for name in used])),
            tooltip=["process:N", "what:N", "name:N", "took:N"],
        )
    )


def memory(facts: Facts) -> alt.Chart:
    """Weights, state and activations of the rank that needs most, over a step; also weights beside the denoiser."""
    held = facts.prediction.memory
    fixed = {"weights": held.weights, "other parts": sum(held.beside.values()), "state": held.state}
    names = [name for name in (*fixed, "activations") if fixed.get(name, 1) or name != "other parts"]
    rows = [
        {"done": done, "part": name, "order": i, "bytes": size, "size": bytes_text(size)}
        for done, alive in facts.memory()
        for i, name in enumerate(names)
        for size in [fixed.get(name, alive)]
    ]
    return (
        alt.Chart(_data(rows), height=220)
        .mark_area(interpolate="step-before")
        .encode(
            x=alt.X(
                "done:Q", title="share of the step's operators that have run", axis=alt.Axis(format="%", tickCount=6)
            ),
            y=alt.Y("bytes:Q", title="bytes", axis=alt.Axis(format="~s", tickCount=5)),
            order="order:Q",
            color=alt.Color("part:N", title=None, sort=names),
            tooltip=["part:N", "size:N"],
        )
    )


def alternatives(facts: Facts) -> alt.TopLevelMixin | None:
    """The time of a generation with other numbers of ranks and strategies."""
    rows = [
        {
            "choice": ranks if ranks == "1 rank" else f"{ranks}, {each.strategy.name}",
            "seconds": round(each.generation(facts.steps), 6),
            "takes": seconds_text(each.generation(facts.steps)),
            "memory": bytes_text(each.memory.total),
            "plan": "this plan" if each is facts.prediction else "another choice",
        }
        for each in facts.predictions
        for ranks in [facts.ranks(each)]
    ]
    if len(rows) < 2:
        return None
    colour = alt.Scale(domain=["this plan", "another choice"], range=["#e45756", "#4c78a8"])
    return (
        alt.Chart(_data(rows), height=22 * len(rows))
        .mark_bar()
        .encode(
            x=alt.X("seconds:Q", title=f"seconds of {facts.steps} steps", axis=alt.Axis(tickCount=8)),
            y=alt.Y("choice:N", title=None, sort=[row["choice"] for row in rows]),
            color=alt.Color("plan:N", title=None, scale=colour),
            tooltip=["choice:N", "takes:N", "memory:N"],
        )
    )
