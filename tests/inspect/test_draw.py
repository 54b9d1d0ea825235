"""Snapshots as drawings."""

import os
import re
import stat
from itertools import pairwise
from pathlib import Path
from typing import Any

import networkx
import pytest
from torch import Tensor, nn

from fxpass.inspect.draw import LIMIT, dot, svg
from fxpass.make_plan import plan
from tests.inspect.plans import planned, small
from tests.runtime.plans import inputs
from tests.tools.command import fxpass

BOX = re.compile(r'^ +"(.*?)" \[label="(.*?)", fillcolor="(.*?)"\];$', re.MULTILINE)


def boxes(text: str) -> dict[str, str]:
    return {key: label for key, label, _ in BOX.findall(text)}


def arrows(text: str) -> set[tuple[str, str]]:
    return set(re.findall(r'^  "(.*?)" -> "(.*?)"(?: \[.*\])?;$', text, re.MULTILINE))


def test_modules_are_boxes_with_their_exchanges_and_arrows_follow_the_values() -> None:
    text = dot(planned().snapshot())
    shown = boxes(text)
    assert shown["module conv_in"].startswith("conv_in  Conv2d\\n3 operators")
    assert shown["module conv_out"].endswith("halo x3.0: 1.0 kB")
    assert shown["x_sample"] == "sample"
    way = ["x_sample", "module conv_in", "part 0 of ", "module norm", "part 1 of ", "module down"]
    assert set(pairwise(way)) <= arrows(text)
    assert all(end in shown for edge in arrows(text) for end in edge)


def test_only_boxes_that_receive_something_are_blue_and_fallbacks_are_red() -> None:
    colours = {key: colour for key, _, colour in BOX.findall(dot(planned().snapshot()))}
    blue = {key for key, colour in colours.items() if colour == "#cfe2f7"}
    assert blue == {"module norm", "module down", "module conv_out", "part 3 of ", "part 4 of "}

    class Gamma(nn.Module):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return nn.functional.silu(sample).lgamma() * timestep

    made = plan(Heavy(Gamma()).eval(), *inputs(), world_size=2)
    colours = {key: colour for key, _, colour in BOX.findall(dot(made.snapshot()))}
    assert colours["module inner"] == "#f7c8c0"


class Heavy(nn.Module):
    """Most of its work can be split; `inner` cannot."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.conv, self.inner = nn.Conv2d(4, 4, 3, padding=1), inner

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.inner(self.conv(sample), timestep)


@pytest.mark.parametrize("limit", [20, 40, LIMIT])
@pytest.mark.parametrize("name", ["flux", "unet_sd", "sd3"])
def test_a_drawing_opens_modules_from_the_outside_up_to_the_limit(name: str, limit: int) -> None:
    text = dot(small(name).snapshot(), limit)
    shown = boxes(text)
    assert len(shown) <= limit
    assert all(end in shown for edge in arrows(text) for end in edge)
    if limit > 20:
        assert "subgraph" in text


def test_equal_neighbours_are_one_box_for_all_of_them() -> None:
    text = dot(small("flux").snapshot())
    assert "2 x Linear\\nto_k, to_v\\n" in text
    assert not any(".to_v" in key for key in boxes(text))


def test_a_dashed_arrow_leads_from_a_repeated_module_to_the_next() -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.SiLU()) for _ in range(4)))

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.blocks(sample) * timestep

    text = dot(plan(Blocks().eval(), *inputs(), world_size=2).snapshot())
    dashed = re.findall(r'"(.*)" -> "(.*)" \[style=dashed, constraint=false\]', text)
    assert dashed == [("module blocks.1.1", "module blocks.1.0")]
    assert ("module blocks.1.0", "module blocks.1.1") in arrows(text)


def test_what_runs_before_and_after_other_modules_has_two_boxes() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.act, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.act(self.second(self.act(self.first(sample)) * timestep))

    text = dot(plan(Twice().eval(), *inputs(), world_size=2).snapshot())
    way = ["x_sample", "module first", "module act", "part 0 of ", "module second", "module act, visit 1"]
    assert set(pairwise(way)) <= arrows(text)
    assert "SiLU\\npart 1 of 2" in boxes(text)["module act"]


def test_arrows_of_closed_modules_that_are_equal_inside_lead_forward() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Pair(), Pair()])

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            each: Any
            for each in self.blocks:
                sample = each.two(each.one(sample) * timestep)
            return sample

    text = dot(plan(Pairs().eval(), *inputs(), world_size=2).snapshot())
    steps = re.findall(r'^  "(.*?)" -> "(.*?)";$', text, re.MULTILINE)
    assert len(steps) >= len(arrows(text)) - 2


@pytest.mark.parametrize("name", ["unet_sdxl", "flux", "dit"])
def test_arrows_that_shape_the_drawing_lead_forward_and_past_no_box(name: str) -> None:
    text = dot(small(name).snapshot())
    steps = networkx.DiGraph(re.findall(r'^  "(.*?)" -> "(.*?)";$', text, re.MULTILINE))
    assert networkx.is_directed_acyclic_graph(steps)
    assert set(networkx.transitive_reduction(steps).edges) == set(steps.edges)
    assert len(steps.edges) > 0.5 * len(arrows(text))


def test_modules_that_exchange_nothing_stay_closed_unless_nothing_is_exchanged() -> None:
    assert "module time_text_embed" in boxes(dot(small("flux").snapshot()))
    assert "module time_text_embed" not in boxes(dot(small("flux", 1).snapshot()))


def stand_in(folder: Path, script: str) -> None:
    program = folder / "dot"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


def test_svg_is_what_graphviz_makes_of_the_drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    stand_in(tmp_path, 'echo "made with $1 of"; cat')
    assert svg(planned().snapshot()) == f"made with -Tsvg of\n{dot(planned().snapshot())}"
    stand_in(tmp_path, "echo broken >&2; exit 3")
    with pytest.raises(OSError, match="failed with exit code 3: broken"):
        svg(planned().snapshot())


def test_without_graphviz_the_command_says_at_once_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    result = fxpass("dump", "no-such-model", "--format", "svg")
    assert result.exit_code == 2
    assert re.fullmatch(r"error: svg needs .*apt install graphviz.*\n", result.stderr)
    assert fxpass("dump", "tests.tools.models:good", "--format", "dot").stdout.startswith("digraph {")
