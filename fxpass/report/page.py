"""A report as one file of HTML that needs no network: texts and tables by a template, charts by Vega."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import torch

from ..extras import missing
from ..inspect.text import cut_texts
from ..inspect.words import bytes_text, count_text, flops_text, seconds_text
from ..ir.garbage import collection_paused
from ..ir.progress import progress
from ..plan import Plan
from .facts import Facts

EMBED = """
const charts = JSON.parse(document.getElementById("charts").textContent);
const started = performance.now();
Promise.all(Object.entries(charts).map(([id, spec]) =>
  vegaEmbed("#" + id, spec, {renderer: "svg", actions: false, ast: true})
)).then(() => { document.documentElement.dataset.drawn = Math.round(performance.now() - started); });
"""


def check_report() -> None:
    """Raises `MissingExtraError` unless everything that a report needs is installed."""
    try:
        import altair  # noqa: F401
        import jinja2  # noqa: F401
        import vl_convert  # noqa: F401
    except ModuleNotFoundError as error:
        raise missing(error) or error from None


@collection_paused()
def page(facts: Facts) -> str:
    """The report.

    Raises:
        MissingExtraError: jinja2, altair or vl-convert is not installed; the message has the line that installs them.
    """
    check_report()
    import jinja2
    import vl_convert

    from .charts import charts

    folder = files("fxpass.report")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"bytes": bytes_text, "flops": flops_text, "seconds": seconds_text}
    environment.globals |= {"count": count_text, "cut_texts": cut_texts}
    with progress("draw charts"):
        drawn = charts(facts)
    return environment.from_string((folder / "page.html.j2").read_text(encoding="utf-8")).render(
        facts=facts,
        plan=facts.plan,
        prediction=facts.prediction,
        snapshot=facts.snapshot,
        versions=versions(),
        drawn=drawn,
        style=(folder / "style.css").read_text(encoding="utf-8"),
        charts=_for_script(drawn),
        records=_for_script(records(facts.plan)),
        script=vl_convert.javascript_bundle(EMBED),
    )


def records(plan: Plan) -> dict[str, Any]:
    """Exchanges, messages and fallbacks as in `fxpass dump --format json`, for programs that read the page."""
    shown = plan.snapshot()
    return {name: [asdict(each) for each in getattr(shown, name)] for name in ("exchanges", "messages", "fallbacks")}


def versions() -> dict[str, str]:
    """What a bug report has to say of the software."""
    return {
        "fxpass": version("fxpass"),
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "system": platform.platform(),
    }


def _for_script(data: Any) -> str:
    """JSON that may stand in a script element."""
    return json.dumps(data, separators=(",", ":"), default=str).replace("<", "\\u003c")
