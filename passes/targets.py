"""Targets: the machine that a plan is made for, as a device and the link between its ranks.

The figures are data (`targets.toml`), each with its source. A file of the same form, which `fxpass calibrate` writes,
serves as a target as well.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

Work = Literal["product", "convolution", "attention"]  #: kinds of operators whose work is counted
Medium = Literal["ports", "bus", "memory"]


@dataclass(frozen=True)
class Device:
    """What computes a rank's program.

    Attributes:
        name: what `--target` calls it.
        description: what it is.
        link: the name of the link that is used if none is given.
        matrix: peak floating-point operations per second of matrix products, by dtype of the operands.
        reached: the share of the peak that large operators reach, by kind of work.
        units: multiprocessors, each of which works on one tile of a result at a time; 1 if work divides at will.
        tiles: the sizes of tiles (rows, columns), and the speed with each, relative to the best.
        bandwidth: bytes per second that operators read and write in the device's memory.
        elements: elements per second of the results of operators that take longer than their bytes do, by their names
            in ATen, as `gelu`.
        cache: bytes of the last cache; a kernel that reads and writes no more finds its operands there.
        cache_bandwidth: bytes per second that such kernels read and write.
        memory: bytes of memory; 0 if unknown.
        kernel: seconds that each kernel takes beside its work.
        launch: seconds in which the host launches a kernel; 0 if the host computes itself.
        sources: where each figure is from.
    """

    name: str
    description: str
    link: str
    matrix: Mapping[str, float]
    bandwidth: float
    reached: Mapping[Work, float] = field(default_factory=dict)
    units: int = 1
    tiles: tuple[tuple[int, int, float], ...] = ((1, 1, 1.0),)
    elements: Mapping[str, float] = field(default_factory=dict)
    cache: float = 0
    cache_bandwidth: float = 0.0
    memory: float = 0
    kernel: float = 0.0
    launch: float = 0.0
    sources: Mapping[str, str] = field(default_factory=dict)

    def rate(self, dtype: str, work: Work = "product") -> float:
        """Floating-point operations per second that large operators of this kind reach.

        Args:
            dtype: of the operands; one that `matrix` does not list counts as the slowest.
        """
        return self.matrix.get(dtype, min(self.matrix.values())) * self.reached.get(work, 1.0)


@dataclass(frozen=True)
class Link:
    """What carries the messages between ranks.

    Attributes:
        name: what `--link` calls it.
        description: what it is.
        medium: `ports`: each rank has a port of its own, which sends and receives at once. `bus`: all messages share
            one bus. `memory`: nothing moves by itself; the sender copies into memory that all share, the receiver out.
        latency: seconds per message, whatever its size.
        bandwidth: bytes per second: of a port in each direction, of the bus, of a copy.
        nodes: the number of machines, among which the ranks are divided evenly; the link joins these.
        late_latency: as `latency`, for messages for the next step, of which several are on their way at once. They can
            fill a link that one message alone does not fill. 0: as `latency`.
        late_bandwidth: as `bandwidth`, for these messages; 0: as `bandwidth`.
        busy_latency: as `latency`, for what a step awaits while messages for the next step are on their way; 0: as
            `latency`.
        overtake: whether what a step awaits overtakes messages for the next step; else messages go in order.
        core_latency: seconds per message that threads of the link take from the cores that compute, whatever its size;
            0 if they have cores of their own. Counted for messages that travel while the ranks compute.
        core_bandwidth: bytes per second, sent and received, that these threads carry; 0: as above.
        inside: the link between the ranks of one machine, if there are several machines.
        sources: where each figure is from.
    """

    name: str
    description: str
    medium: Medium
    latency: float
    bandwidth: float
    nodes: int = 1
    late_latency: float = 0.0
    late_bandwidth: float = 0.0
    busy_latency: float = 0.0
    overtake: bool = False
    core_latency: float = 0.0
    core_bandwidth: float = 0.0
    inside: Link | None = None
    sources: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """A device and the link between its ranks.

    The search for cuts weighs computation against communication with the figures of large operators.
    """

    device: Device
    link: Link

    @property
    def name(self) -> str:
        return self.device.name if self.link.name == self.device.link else f"{self.device.name} over {self.link.name}"

    def compute(self, flops: float, written: float) -> float:
        """Seconds of an operator: its work, and reading as many bytes as it writes."""
        return flops / (max(self.device.matrix.values()) * self.device.reached.get("product", 1.0)) + (
            2 * written / self.device.bandwidth
        )

    def message(self, received: float) -> float:
        """Seconds of one message, for a rank that receives so many bytes."""
        return self.link.latency + received / self.link.bandwidth


# -- reading ----------------------------------------------------------------------------------------------------------

PACKAGED = Path(__file__).with_name("targets.toml")


@dataclass(frozen=True)
class Targets:
    """The devices and links of a file, by name."""

    devices: Mapping[str, Device]
    links: Mapping[str, Link]


@cache
def packaged() -> Targets:
    """The devices and links that are part of the package."""
    return read(PACKAGED)


def read(path: Path) -> Targets:
    """The devices and links of a file.

    Raises:
        ValueError: the file is not of the form of `targets.toml`; the message says where.
        OSError: it cannot be read.
    """
    try:
        data = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML file: {error}") from None
    known = {} if path == PACKAGED else dict(packaged().links)
    for name, entry in data.get("links", {}).items():
        where = f"{path}, links.{name}"
        inside = entry.get("inside")
        if inside is not None and inside not in known:
            raise ValueError(f"{where}: `inside` names the link {inside!r}, which is not there or comes later")
        link = _made(Link, name, entry | {"inside": None if inside is None else known[inside]}, where)
        if link.medium not in get_args(Medium):
            raise ValueError(f"{where}: `medium` is one of {', '.join(get_args(Medium))}, not {link.medium!r}")
        known[name] = link
    devices: dict[str, Device] = {}
    for name, entry in data.get("devices", {}).items():
        where = f"{path}, devices.{name}"
        devices[name] = device = _made(Device, name, entry, where)
        if device.link not in known:
            raise ValueError(f"{where}: there is no link {device.link!r}")
        if not device.matrix:
            raise ValueError(f"{where}: `matrix` has no dtype")
    return Targets(devices, known)


def _made(kind: type[Any], name: str, entry: Any, where: str) -> Any:
    """A `Device` or a `Link` from a table of a file."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is no table")
    wanted = {each.name: each for each in fields(kind) if each.name != "name"}
    if unknown := sorted(entry.keys() - wanted.keys()):
        near = difflib.get_close_matches(unknown[0], wanted, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(wanted)}"
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; {hint}")
    needed = [key for key, each in wanted.items() if each.default is MISSING and each.default_factory is MISSING]
    if missing := [key for key in needed if key not in entry]:
        raise ValueError(f"{where}: {missing[0]!r} is missing")
    for key, value in entry.items():
        if key in ("matrix", "reached", "elements", "sources") and not isinstance(value, dict):
            raise ValueError(f"{where}: {key!r} is no table")
        for number in value.values() if isinstance(value, dict) else (value,):
            if key in NUMBERS and (isinstance(number, bool) or not isinstance(number, int | float) or number < 0):
                raise ValueError(f"{where}: {key!r} is {number!r}, not a positive number")
    if "tiles" in entry:
        entry = entry | {"tiles": tuple(map(tuple, entry["tiles"]))}
    return kind(name=name, **entry)


NUMBERS = {"matrix", "reached", "elements", "units", "bandwidth", "cache", "cache_bandwidth", "memory", "kernel"}
NUMBERS |= {"launch", "latency", "nodes", "core_latency", "core_bandwidth"}
NUMBERS |= {"late_latency", "late_bandwidth", "busy_latency"}


def find(target: str, link: str | None = None) -> Target:
    """The target of a device and a link.

    Args:
        target: the name of a device ("auto" is a CPU), or a file of the form of `targets.toml`, whose first device is
            meant.
        link: the name of a link of that file or of the package; None for the one that the device names.

    Raises:
        ValueError: there is no such device, link or file; the message suggests the nearest.
    """
    if target.endswith(".toml"):
        path = Path(target)
        if not path.is_file():
            raise ValueError(f"there is no file {target}; `fxpass calibrate -o {target}` would write one")
        tables = read(path)
        if not tables.devices:
            raise ValueError(f"{target} has no table [devices.NAME]")
        device = next(iter(tables.devices.values()))
    else:
        tables = packaged()
        name = _named("target", target, ["auto", *tables.devices])
        device = tables.devices["cpu" if name == "auto" else name]
    if link is None:
        return Target(device, tables.links[device.link])
    return Target(device, tables.links[_named("link", link, tables.links)])


def _named(what: str, name: str, names: Collection[str]) -> str:
    """The name among `names`, whose case does not matter."""
    by_lower = {each.lower(): each for each in names}
    if name.lower() in by_lower:
        return by_lower[name.lower()]
    near = difflib.get_close_matches(name.lower(), by_lower, n=1)
    hint = f"did you mean {by_lower[near[0]]}? " if near else ""
    raise ValueError(f"no {what} is called {name!r}; {hint}The {what}s are {', '.join(names)}")
