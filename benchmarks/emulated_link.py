"""A network link of a limited rate between two ranks on this machine.

Each rank runs in its own network namespace. A pair of virtual Ethernet devices joins the two, and `tc` limits what
leaves either end (`tbf rate … burst 1mbit latency 50ms`). gloo carries all messages (`FXPASS_SHM_DISABLE=1`). The speed
of a plain transfer is measured at each rate; the run ends if it differs from the rate.

The burst has room for one of the kernel's packets (64 KB). With a smaller one (256 kbit) the kernel cuts each packet
into Ethernet frames, on the cores that the ranks compute with; network cards do that in hardware.

Needs Linux, root, and `ip` and `tc` (apt-get install iproute2); if something is missing, it says what and stops. The
namespaces are deleted at the end, except after SIGKILL.
"""

from __future__ import annotations

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
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.harness import RANK_ENVIRONMENT

LOOPBACK = "loopback"  #: the same devices, unlimited
DEVICE = "fxlink"
ADDRESSES = ("10.77.0.1", "10.77.0.2")  # visible only inside the namespaces
PROBE = 8 << 20  #: bytes of a plain transfer
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


def on_linked_processes(module: str) -> None:
    """Start `python -m module` again as two ranks, joined by the link; exit with their status."""
    if reason := missing():
        print(f"skipped: {reason}")
        return
    for number in SIGNALS:
        signal.signal(number, interrupted)
    sys.exit(run_ranks(module))


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


def run_ranks(module: str) -> int:
    """Start a rank in each of two joined namespaces, and clean up at the end; returns 0 if both succeed."""
    try:
        with namespaces() as names:
            ranks: list[subprocess.Popen[bytes]] = []
            try:
                for rank, name in enumerate(names):
                    ranks.append(start(rank, name, module))
                while None in (codes := [rank.poll() for rank in ranks]) and not any(codes):
                    time.sleep(0.2)
            finally:
                for rank in ranks:
                    stop(rank)
            return max(abs(rank.returncode) for rank in ranks)
    except subprocess.CalledProcessError as error:
        print(f"skipped: `{' '.join(error.cmd)}` failed: {error.stderr.strip()}")
        return 0


def start(rank: int, namespace: str, module: str) -> subprocess.Popen[bytes]:
    """Start `python -m module` as rank `rank` of two, in a namespace."""
    environment = {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": ADDRESSES[0],
        "MASTER_PORT": "29500",
        "GLOO_SOCKET_IFNAME": DEVICE,
        "FXPASS_SHM_DISABLE": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # torch warns that addresses have no names here
    }
    command = ["ip", "netns", "exec", namespace, sys.executable, "-m", module, *sys.argv[1:]]
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
