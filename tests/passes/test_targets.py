"""Targets as data: devices, links, and files of the same form."""

from dataclasses import replace
from pathlib import Path

import pytest

from fxpass.passes.targets import NUMBERS, Device, Link, find, packaged
from fxpass.predict.calibrate import to_toml

FIGURES = {"tiles", *NUMBERS} - {"nodes"}
FILE = """
[devices.mine]
description = "a machine"
link = "cable"
matrix = { float32 = 1e12 }
bandwidth = 1e11
[links.cable]
description = "a cable"
medium = "ports"
latency = 1e-4
bandwidth = 1e9
"""


@pytest.mark.parametrize("entry", [*packaged().devices.values(), *packaged().links.values()], ids=lambda e: e.name)
def test_every_figure_has_a_source(entry: Device | Link) -> None:
    plain = Device("", "", "", {}, 0.0) if isinstance(entry, Device) else Link("", "", "ports", -1.0, -1.0)
    given = {name for name in FIGURES if getattr(entry, name, None) != getattr(plain, name, None)}
    assert given <= entry.sources.keys() <= FIGURES
    assert all(entry.sources.values())


def test_a_target_is_a_device_and_the_link_that_it_names_or_another() -> None:
    assert find("h100").name == "H100"
    other = find("H100", "pcie4")
    assert other.name == "H100 over pcie4"
    assert other.link.bandwidth < find("H100").link.bandwidth


def test_the_search_weighs_with_the_rate_of_large_operators() -> None:
    target = find("cpu")
    assert target.compute(6e10, 0) == target.compute(0, 4e9) == 1.0
    assert target.message(2e9) == 1.0 + 2e-4


def test_a_file_of_the_same_form_is_a_target(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(FILE)
    target = find(str(path))
    assert (target.name, target.link.name, target.device.matrix["float32"]) == ("mine", "cable", 1e12)
    assert find(str(path), "nvlink4").link == packaged().links["nvlink4"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("bandwidth = 1e11", "bandwith = 1e11", "devices.mine: unknown key 'bandwith'; did you mean 'bandwidth'?"),
        ("bandwidth = 1e11\n", "", "devices.mine: 'bandwidth' is missing"),
        ("bandwidth = 1e11", "bandwidth = -1", "devices.mine: 'bandwidth' is -1, not a positive number"),
        ("float32 = 1e12", "float32 = 'fast'", "devices.mine: 'matrix' is 'fast', not a positive number"),
        ("{ float32 = 1e12 }", "{ }", "devices.mine: `matrix` has no dtype"),
        ('"ports"', '"air"', "links.cable: `medium` is one of ports, bus, memory, not 'air'"),
        ('link = "cable"', 'link = "cabel"', "devices.mine: there is no link 'cabel'"),
        ("latency = 1e-4", 'latency = 1e-4\ninside = "cabel"', "links.cable: `inside` names the link 'cabel'"),
        ("[devices.mine]", "[devices.mine", "is no TOML file"),
        ("[devices.mine]", "[other.mine]", r"has no table \[devices.NAME\]"),
    ],
)
def test_a_faulty_file_is_refused_with_its_place(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    assert old in FILE
    path.write_text(FILE.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        find(str(path))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("H10",), "no target is called 'H10'; did you mean H100?"),
        (("trainium",), "no target is called 'trainium'; The targets are auto, cpu, gpu, "),
        (("H100", "nvlink"), "no link is called 'nvlink'; did you mean nvlink"),
        (("none.toml",), "there is no file none.toml"),
    ],
)
def test_wrong_names_are_refused_with_the_nearest(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        find(*names)


@pytest.mark.parametrize("name", ["mine", "my laptop", 'a "b".c', "küche"])
def test_a_device_that_was_measured_may_have_any_name(name: str, tmp_path: Path) -> None:
    shm = find("cpu", "shm").link
    (tmp_path / "file.toml").write_text(to_toml(replace(find("cpu").device, name=name), {"shm": shm}))
    assert find(str(tmp_path / "file.toml")).device.name == name


def test_the_page_on_targets_names_every_device_and_link() -> None:
    page = (Path(__file__).parents[2] / "docs" / "targets.md").read_text()
    known = packaged()
    assert not [name for name in (*known.devices, *known.links) if f"`{name}`" not in page]
