"""`make bench-link`: run the UNet on two ranks over a network link, and report the share of its unlimited speed.

    python -m benchmarks.link [--rounds 10] [--rates 1gbit 300mbit]
    python -m benchmarks.link --trace steps.json [--rates 300mbit]

Each rank runs in its own network namespace. A pair of virtual Ethernet devices joins the two, and `tc` limits what
leaves either end (`tbf rate … burst 1mbit latency 50ms`). gloo carries all messages (`FXPASS_SHM_DISABLE=1`). Every
round goes through all rates, "loopback" (the same devices, unlimited) first; at each rate "displaced", "compressed",
"no_sync" and "sync" alternate, so that other load on the machine affects all of them. The speed of a plain transfer is
measured first at each rate; the run ends if it differs from the rate.

The burst has room for one of the kernel's packets (64 KB). With a smaller one (`--burst 256kbit`) the kernel cuts each
packet into Ethernet frames, on the cores that the ranks compute with; network cards do that in hardware.

Needs Linux, root, and `ip` and `tc` (apt-get install iproute2); if something is missing, it says what and stops. The
namespaces are deleted at the end, except after SIGKILL.

DistriFusion's code, with bursts of 256 kbit, kept 0.90 (1 Gbit/s) and 0.72 (300 Mbit/s) of its speed, in its sync
mode 0.80 and 0.61.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.harness import RANK_ENVIRONMENT, contenders, heading, in_turns, ratio, spread, steppers, take_part
from benchmarks.trace import trace

LOOPBACK = "loopback"
STRATEGIES = ("displaced", "compressed", "no_sync", "sync")
STEPS = 1  #: timed steps per turn, after an untimed one
DEVICE = "fxlink"
ADDRESSES = ("10.77.0.1", "10.77.0.2")  # visible only inside the namespaces
PROBE = 8 << 20  #: bytes of a plain transfer
AIM = 0.95
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


@dataclass(frozen=True)
class Link:
    """The limit of the link, for both directions."""

    rate: str
    burst: str

    def __str__(self) -> str:
        return self.rate if self.rate == LOOPBACK else f"{self.rate}, bursts of {self.burst}"

    @property
    def limit(self) -> list[str]:
        """The arguments of tc that limit what leaves this end of the pair."""
        limited = ["tbf", "rate", self.rate, "burst", self.burst, "latency", "50ms"]
        return ["qdisc", "replace", "dev", DEVICE, "root", *(["noqueue"] if self.rate == LOOPBACK else limited)]


def main() -> None:
    parser = argparse.ArgumentParser(description="two ranks over an emulated network link")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--rates", nargs="+", type=amount, default=["1gbit", "300mbit"], help="per second, as in 300mbit"
    )
    parser.add_argument("--burst", type=amount, default="1mbit", help="burst size, for example 256kbit")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write a Chrome trace of two steps per rate instead")
    options = parser.parse_args()
    if "RANK" in os.environ:
        links = [Link(rate, options.burst) for rate in [LOOPBACK, *options.rates]]
        take_part(traced(links, options.trace) if options.trace else measure(links, options.rounds))
    elif reason := missing():
        print(f"skipped: {reason}")
    else:
        for number in SIGNALS:
            signal.signal(number, interrupted)
        sys.exit(run_ranks())


def amount(text: str) -> str:
    """Return `text` if it is a number of bits with a unit. Raises `ValueError` otherwise."""
    bits(text)
    return text


def interrupted(number: int, _: Any) -> None:
    """Exit through the `finally` blocks, which nothing may interrupt."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


def missing() -> str | None:
    """Why namespaces cannot be created here, or an empty text."""
    if not sys.platform.startswith("linux"):
        return "network namespaces need Linux"
    absent = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if absent:
        return f"{' and '.join(absent)} not found; apt-get install iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    return None


def run_ranks() -> int:
    """Start a rank in each of two joined namespaces, and clean up at the end; returns 0 if both succeed."""
    try:
        with namespaces() as names:
            ranks: list[subprocess.Popen[bytes]] = []
            try:
                for rank, name in enumerate(names):
                    ranks.append(start(rank, name))
                while None in (codes := [rank.poll() for rank in ranks]) and not any(codes):
                    time.sleep(0.2)
            finally:
                for rank in ranks:
                    stop(rank)
            return max(abs(rank.returncode) for rank in ranks)
    except subprocess.CalledProcessError as error:
        print(f"skipped: `{' '.join(error.cmd)}` failed: {error.stderr.strip()}")
        return 0


def start(rank: int, namespace: str) -> subprocess.Popen[bytes]:
    """Start this script as rank `rank` of two, in a namespace."""
    environment = {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": ADDRESSES[0],
        "MASTER_PORT": "29500",
        "GLOO_SOCKET_IFNAME": DEVICE,
        "FXPASS_SHM_DISABLE": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # torch warns that addresses have no names here
    }
    command = ["ip", "netns", "exec", namespace, sys.executable, "-m", "benchmarks.link", *sys.argv[1:]]
    # a session of its own: Ctrl-C is for this process, which ends the ranks
    return subprocess.Popen(command, env=os.environ | RANK_ENVIRONMENT | environment, start_new_session=True)


def stop(rank: subprocess.Popen[bytes]) -> None:
    """Terminate a process if it still runs."""
    rank.terminate()
    try:
        rank.wait(5)
    except subprocess.TimeoutExpired:
        rank.kill()
        rank.wait()


@contextmanager
def namespaces() -> Iterator[list[str]]:
    """Create two joined namespaces; delete them at the end."""
    token = secrets.token_hex(4)
    names = [f"fxpass-{token}-{rank}" for rank in range(2)]
    pair = ["ip", "link", "add", DEVICE, "netns", names[0], "type", "veth", "peer", "name", DEVICE, "netns", names[1]]
    try:
        for name in names:
            run("ip", "netns", "add", name)
        run(*pair)
        for name, address in zip(names, ADDRESSES, strict=True):
            run("ip", "-n", name, "address", "add", f"{address}/24", "dev", DEVICE)
            for device in ("lo", DEVICE):
                run("ip", "-n", name, "link", "set", device, "up")
        run("tc", "-n", names[0], *Link("1gbit", "1mbit").limit)  # check that this system supports the limit
        yield names
    finally:
        for name in names:
            delete(name)


def run(*words: str) -> None:
    """Raises `subprocess.CalledProcessError` if the command fails."""
    subprocess.run(words, check=True, capture_output=True, text=True)


def delete(namespace: str) -> None:
    """Delete the namespace, if it exists."""
    subprocess.run(["ip", "netns", "del", namespace], check=False, capture_output=True)


# -- in the ranks ---------------------------------------------------------------------------------------------------


def set_up(link: Link) -> None:
    """Limit both directions."""
    dist.barrier()
    run("tc", *link.limit)
    dist.barrier()


def transfer() -> float:
    """Bits per second that gloo reaches in the slower direction; the best of three attempts."""
    data = torch.zeros(PROBE, dtype=torch.uint8)
    best: list[float] = []
    for source in range(2):
        seconds: list[float] = []
        for _ in range(3):
            dist.barrier()
            began = time.monotonic()
            dist.broadcast(data, source)  # ends when the other rank has received everything
            taken = torch.tensor(time.monotonic() - began, dtype=torch.float64)
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            seconds.append(taken.item())
        best.append(8 * PROBE / min(seconds))
    return min(best)


def checked(link: Link) -> float:
    """The speed of a plain transfer, bits per second. Raises `RuntimeError` if it differs from the link's rate."""
    set_up(link)
    reached = transfer()
    if link.rate != LOOPBACK and not 0.75 < reached / bits(link.rate) < 1.1:
        raise RuntimeError(f"the link has {reached / 1e6:.0f} Mbit/s instead of {link.rate}")
    return reached


def bits(text: str) -> float:
    """Parse an amount as tc writes it, into bits. Raises `ValueError` for units that are not in `UNITS`."""
    for unit, factor in UNITS.items():
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * factor
    raise ValueError(f"an amount is a number of {', '.join(UNITS)}, not {text!r}")


@torch.no_grad()
def measure(links: list[Link], rounds: int) -> Iterator[str]:
    """Run all strategies over all links in turns; returns the report."""
    model, ready = steppers("unet", STRATEGIES)
    running = contenders(ready)
    reached = {link: checked(link) for link in links}
    seconds: dict[tuple[Link, str], list[float]] = {(link, name): [] for link in links for name in STRATEGIES}
    for turn in range(rounds + 1):
        for link in links:
            set_up(link)
            found = in_turns(running, turn, STEPS)
            if turn:  # the first turn warms up
                for name in STRATEGIES:
                    seconds[link, name].append(found[name])
    lines = [heading("unet", model, f"{rounds} rounds of {STEPS} steps, medians (min–max) in seconds per step")]
    for link in links:
        lines.append(f"  {link}: a plain transfer reaches {reached[link] / 1e6:.0f} Mbit/s")
        for name in STRATEGIES:
            line = f"    {name:<9} {spread(seconds[link, name])}"
            if link.rate != LOOPBACK:
                line += f"   keeps {ratio(seconds[links[0], name], seconds[link, name])}"
                line += f"   aim: at least {AIM}" if name == "displaced" else ""
            lines.append(line)
        lines.append(f"    displaced / no_sync  {ratio(seconds[link, 'displaced'], seconds[link, 'no_sync'])}")
    yield "\n".join(lines)


@torch.no_grad()
def traced(links: list[Link], file: Path) -> Iterator[str]:
    """Record two displaced steps over each link next to `file`, with the rate in the name; returns rank 0's tables."""
    _, ready = steppers("unet", ("displaced",))
    for link in links:
        reached = checked(link)
        seen = trace(ready["displaced"])
        yield f"{link.rate}, {reached / 1e6:.0f} Mbit/s: {seen.written(file, link.rate)}" if seen else ""


if __name__ == "__main__":
    main()
