"""`fxpass report`: one page about a plan."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fxpass.extras import MissingExtraError
from fxpass.make_plan import plan
from fxpass.predict.prediction import Prediction
from fxpass.report.facts import Facts
from fxpass.report.page import page
from tests.inspect.plans import planned, small
from tests.inspect.test_identifiers import of_plan
from tests.runtime.plans import block, inputs
from tests.tools.command import fxpass
from tests.tools.models import unsplittable

GOOD = "tests.tools.models:good"
ARGUMENTS = ("--strategy", "displaced", "--target", "H100", "--link", "pcie4")


class Page(HTMLParser):
    """What tests need of a page: attributes of elements by tag, texts of scripts, cells of rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.data: dict[str, Any] = {}
        self.inside: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = dict(attrs).get("id") if tag == "script" else None

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.data[self.inside] = json.loads(data)
            self.inside = None

    def ids(self, tag: str) -> list[str]:
        return [attrs["id"] or "" for name, attrs in self.elements if name == tag and "id" in attrs]


def test_a_report_is_one_file_that_refers_to_nothing_outside(tmp_path: Path) -> None:
    fxpass("report", GOOD, *ARGUMENTS, "-o", tmp_path / "report.html")
    shown = Page((tmp_path / "report.html").read_text())
    for tag, attrs in shown.elements:
        for name in ("src", "href", "srcset", "action"):
            assert (attrs.get(name) or "#").startswith("#"), (tag, attrs)
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").stat().st_size < 1.5e6


@pytest.mark.parametrize(
    "strategy", ["displaced", "pcpp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sync", "compressed"))]
)
def test_a_report_lists_every_exchange_with_its_identifier_and_bytes(strategy: str) -> None:
    made = planned(strategy, 3)
    shown = Page(page(Facts("block", made, compare=False)))
    assert shown.ids("tr") == [each.id for each in made.exchanges]
    found = {each["id"]: (each["exact"], each["steady"]) for each in shown.data["records"]["exchanges"]}
    assert found == of_plan(made)


def test_a_report_of_a_mesh_shows_the_ranks_of_all_groups() -> None:
    made = plan(block(), *inputs(), world_size=4, cfg=2, strategy="displaced")
    facts = Facts("block", made)
    shown = Page(text := unescape(page(facts)))
    assert "<h1>block on 4 ranks (2 groups of 2 patches)</h1>" in text
    found = {each["id"]: (each["exact"], each["steady"]) for each in shown.data["records"]["exchanges"]}
    assert found == of_plan(made)
    assert all(f'"ranks":"ranks {a}, {b}"' in text for a, b in ((0, 2), (1, 3)))
    assert {bar.process for bars in facts.timelines.values() for bar in bars} == {0, 1, 2, 3}
    assert {(each.world, each.strategy.name) for each in facts.alternatives if isinstance(each, Prediction)} >= {
        (4, "displaced"),  # patches alone
        (2, "sync"),
    }
    assert facts.parts[0].state == made.state_bytes_per_rank[facts.rank] > 0


def test_a_report_names_fallbacks_with_reasons_and_their_exchanges() -> None:
    model, args, kwargs = unsplittable()
    made = plan(model, *args, world_size=2, **kwargs)
    text = unescape(page(Facts("unsplittable", made, compare=False)))
    assert len(made.gathered) == 2
    for fallback in made.gathered:
        assert fallback.reason in text
        assert all(f'<a href="#{each}">{each}</a>' in text for each in fallback.exchanges)


def test_a_report_compares_numbers_of_ranks_and_says_which_are_impossible() -> None:
    facts = Facts("block", planned("displaced", 2), steps=7)
    assert {(each.world, each.strategy.name) for each in facts.predictions} >= {
        (1, "sync"),
        (2, "sync"),
        (2, "displaced"),
    }
    text = page(facts)
    for each in facts.predictions:
        assert f"<td>{each.world}</td>" in text
    assert len(facts.predictions) == len({(each.world, each.strategy) for each in facts.predictions})


def test_parts_of_the_map_lie_inside_the_module_around_them_and_sum_up_to_it() -> None:
    facts = Facts("flux", small("flux", 2, "displaced"), compare=False)
    by_path = {part.path: part for part in facts.parts}
    whole = facts.parts[0]
    assert (whole.path, whole.start, whole.end) == ("", 0.0, pytest.approx(1.0))
    assert whole.received == facts.snapshot.received() > 0
    assert whole.state == facts.plan.state_bytes_per_rank[facts.rank] > 0
    assert whole.flops == facts.plan.flops_per_rank[facts.rank]
    for part in facts.parts[1:]:
        around = by_path[part.path.removesuffix(part.name).rstrip(".")]
        assert around.depth == part.depth - 1
        assert around.start - 1e-9 <= part.start <= part.end <= around.end + 1e-9
        inner = [each for each in facts.parts if each.depth == part.depth + 1 and each.path.startswith(f"{part.path}.")]
        for name in ("seconds", "flops", "received", "state"):
            assert sum(getattr(each, name) for each in inner) <= getattr(part, name) * (1 + 1e-9)


def test_a_timeline_shows_one_step_of_every_rank_and_no_two_bars_of_a_lane_overlap_in_computation() -> None:
    facts = Facts("flux", small("flux", 3, "displaced"), compare=False)
    assert list(facts.timelines) == ["exact step", "displaced step"]
    for name, bars in facts.timelines.items():
        assert {bar.process for bar in bars} == {0, 1, 2}
        step = facts.prediction.exact if name == "exact step" else facts.prediction.steady
        assert step is not None
        assert min(bar.began for bar in bars) >= 0
        assert max(bar.ended for bar in bars) == pytest.approx(step.seconds)
        lane = sorted((bar.began, bar.ended) for bar in bars if bar.process == 1 and bar.lane == "compute")
        assert all(a[1] <= b[0] + 1e-12 for a, b in pairwise(lane))
    assert "message for next step" in {bar.what for bar in facts.timelines["displaced step"]}
    assert "message for next step" not in {bar.what for bar in facts.timelines["exact step"]}


def test_memory_over_a_step_reaches_what_is_predicted() -> None:
    facts = Facts("flux", small("flux", 2), compare=False)
    assert max(size for _, size in facts.memory(points=10)) == facts.prediction.memory.activations
    assert len(facts.memory(points=10)) == 10
    assert facts.memory()[-1][0] == 1


def test_a_bundle_holds_the_page_the_plan_a_dump_versions_and_the_log(tmp_path: Path) -> None:
    fxpass("report", GOOD, "--bundle", "--no-compare", "-o", tmp_path / "bug.zip")
    archive = zipfile.ZipFile(io.BytesIO((tmp_path / "bug.zip").read_bytes()))
    held = {Path(name).name: archive.read(name).decode() for name in archive.namelist()}
    assert set(held) == {
        "report.html", "versions.json", "plan.json", "prediction.json", "dump.json", "dump.txt", "log.txt"
    }  # fmt: skip
    assert json.loads(held["plan.json"])["fingerprint"] == json.loads(held["dump.json"])["fingerprint"]
    assert "partition" in held["log.txt"]
    assert json.loads(held["versions.json"])["torch"]


def test_a_bundle_of_a_model_that_cannot_be_captured_holds_the_error(tmp_path: Path) -> None:
    done = fxpass("report", "tests.tools.models:uncapturable", "--bundle", "-o", tmp_path / "bug.zip")
    assert done.exit_code == 2
    archive = zipfile.ZipFile(tmp_path / "bug.zip")
    held = {Path(name).name: archive.read(name).decode() for name in archive.namelist()}
    assert set(held) == {"versions.json", "log.txt"}
    assert "CaptureError" in held["log.txt"]
    fxpass("report", "no-such-model", "--bundle", "-o", tmp_path / "none.zip")
    assert not (tmp_path / "none.zip").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["no-such-model"], "no-such-model"),
        ([GOOD, "--target", "H10"], "H100"),
        ([GOOD, "--strategy", "displace"], "displaced"),
        ([GOOD, "-n", 999], "999"),
    ],
)
def test_a_wrong_argument_is_one_line_and_leaves_no_file(wrong: list[Any], message: str, tmp_path: Path) -> None:
    done = fxpass("report", *wrong, "-o", tmp_path / "report.html")
    assert done.exit_code == 2
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["altair", "jinja2", "vl_convert"])
def test_without_the_extra_the_message_says_what_to_install_before_anything_is_captured(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = Facts("block", planned(), compare=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf'{module} is not installed; run: pip install "fxpass\[report\]"'):
        page(facts)
    done = fxpass("report", "no-such-model", "-o", tmp_path / "report.html")
    assert done.exit_code == 2
    assert done.stderr == f'error: {module} is not installed; run: pip install "fxpass[report]"\n'


# -- in a browser ------------------------------------------------------------------------------------------------------

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(page(Facts("flux", small("flux", 2, "displaced"))))
    return path


@pytest.fixture
def browser() -> Iterator[Any]:
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("needs chromium and chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for each in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking"):
        options.add_argument(each)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    driver.execute_cdp_cmd("Network.enable", {})
    driver.execute_cdp_cmd("Network.emulateNetworkConditions", OFFLINE)
    try:
        yield driver
    finally:
        driver.quit()


OFFLINE = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}


def opened(browser: Any, path: Path, width: int = 1200, *, dark: bool = False) -> float:
    """Open a report, wait until its charts are drawn, and return how many seconds that took in the page."""
    from selenium.webdriver.support.ui import WebDriverWait

    media = {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(path.as_uri())
    drawn = "return document.documentElement.dataset.drawn"
    WebDriverWait(browser, 30).until(lambda b: b.execute_script(drawn) is not None)
    return int(browser.execute_script(drawn)) / 1e3


def test_a_browser_draws_every_chart_offline_without_complaints(browser: Any, report: Path) -> None:
    assert opened(browser, report) < 2
    names = browser.execute_script("return [...document.querySelectorAll('.chart')].map(each => each.id)")
    assert names == ["strips", "map", "roles", "timeline-exact", "timeline-displaced", "memory", "alternatives"]
    for name in names:
        marks = f"return document.querySelectorAll('#{name} svg .mark-rect path, #{name} svg .mark-area path').length"
        assert browser.execute_script(marks) > 1, name
    assert browser.get_log("browser") == []


OTHERS = [(360, False), (1200, True), (1200, False)]


@pytest.mark.parametrize(
    ("width", "dark"),
    [
        (360, True),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((360, False), (1200, True), (1200, False))),
    ],
)
def test_a_page_fits_phones_and_its_text_can_be_read_in_light_and_dark(
    browser: Any, report: Path, width: int, dark: bool
) -> None:
    opened(browser, report, width, dark=dark)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    colours = browser.execute_script(
        "return [getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor,"
        " getComputedStyle(document.querySelector('#memory svg text')).fill]"
    )
    text, background, label = (sum(map(float, re.findall(r"[\d.]+", each)[:3])) for each in colours)
    assert abs(text - background) > 400
    assert label == text
    assert (background < text) == dark


@pytest.mark.slow
def test_the_colours_of_the_map_follow_the_keyboard(browser: Any, report: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    opened(browser, report)
    fills = "return [...document.querySelectorAll('#map svg .mark-rect path')].map(each => each.getAttribute('fill'))"
    before = browser.execute_script(fills)
    browser.find_element(By.CSS_SELECTOR, "#map input[type=radio]:checked").send_keys(Keys.ARROW_RIGHT)
    assert browser.execute_script(fills) != before


@pytest.mark.slow
def test_a_link_from_the_skip_line_and_each_section_can_be_reached_by_the_tab_key(browser: Any, report: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    opened(browser, report)
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    reached, tags = [], set()
    for _ in range(40):
        reached.append(browser.execute_script("return document.activeElement.getAttribute('href')"))
        tags.add(browser.execute_script("return document.activeElement.tagName"))
        browser.switch_to.active_element.send_keys(Keys.TAB)
    sections = [f"#{each}" for each in Page(report.read_text()).ids("section")]
    assert reached[: len(sections) + 1] == ["#picture", *sections]
    assert tags >= {"A", "SUMMARY", "INPUT", "DIV"}  # DIV: tables that may be wider than the page
