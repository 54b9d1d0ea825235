"""Measure a machine's own figures: a device as `Device`, and its file of the form of `targets.toml`."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..passes.targets import Device, Link, Work, packaged

ROUNDS = 7  #: of each measurement; the median counts
LARGE = {"cpu": 1536, "cuda": 8192}  #: rows of a large matrix
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float16", "bfloat16", "float32")}
TINY = 200  #: tiny operators that are timed together


def device_of(name: str, device: torch.device, link: str) -> Device:
    """Measure a device; takes some seconds.

    Args:
        name: what the file shall call it.
        link: the name of the link that joins such devices.
    """
    timer = _Timer(device)
    kind = device.type
    matrix = {name: _products(timer, getattr(torch, name)) for name in DTYPES[kind]}
    usual = DTYPES[kind][0]
    rates, bandwidth, elements = _in_a_step(timer, getattr(torch, usual))
    reached: dict[Work, float] = {work: rate / matrix[usual] for work, rate in rates.items()}
    kernel, launch = _tiny(timer)
    what = "measured by fxpass calibrate"
    sources: dict[str, str] = dict.fromkeys(("matrix", "reached", "bandwidth", "kernel"), what)
    more: dict[str, Any] = {}
    if kind == "cpu":
        more, sources["elements"] = {"elements": elements}, what
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = packaged().devices["H100"]
        more = {"units": properties.multi_processor_count, "tiles": gpu.tiles, "launch": launch}
        sources |= {"units": "the driver", "tiles": gpu.sources["tiles"], "launch": what}
    memory = properties.total_memory if kind == "cuda" else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    sources["memory"] = "the driver" if kind == "cuda" else "the operating system"
    described = (
        properties.name if kind == "cuda" else f"{_processor()}, threads of a process: {torch.get_num_threads()}"
    )
    return Device(
        name, described, link, matrix, bandwidth, reached, memory=memory, kernel=kernel, sources=sources, **more
    )


class _Timer:
    """Times calls on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], Any]) -> float:
        """The median time of a call."""
        taken = []
        for turn in range(ROUNDS + 2):
            self.settle()
            began = time.perf_counter()
            call()
            self.settle()
            if turn >= 2:
                taken.append(time.perf_counter() - began)
        return statistics.median(taken)

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=self.device).to(dtype)


def _products(timer: _Timer, dtype: torch.dtype) -> float:
    n = LARGE[timer.device.type]
    a, b = timer.random(n, n, dtype=dtype), timer.random(n, n, dtype=dtype)
    return 2 * n**3 / timer.seconds(lambda: a @ b)


#: operators that take a CPU longer than reading and writing their operands in order does
ELEMENTS: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("gelu", F.gelu),
    ("gelu", lambda h: F.gelu(h, approximate="tanh")),
    ("silu", F.silu),
    ("layer_norm", lambda h: F.layer_norm(h, h.shape[-1:])),
    ("rms_norm", lambda h: F.rms_norm(h, h.shape[-1:])),
    ("clone", lambda h: h.mT.contiguous()),
    ("upsample_nearest2d", lambda h: F.interpolate(h[None], scale_factor=2.0)),
]


def _in_a_step(timer: _Timer, dtype: torch.dtype) -> tuple[dict[Work, float], float, dict[str, float]]:
    """FLOPs per second of each kind of work, bytes per second of an addition, and elements per second of `ELEMENTS`.

    The operators take turns, each time with other weights and with new memory for their results, as in a step: one that
    is repeated by itself finds its operands in the caches, and is up to a sixth faster.
    """
    small = timer.device.type == "cpu"
    side, channels = (64, 256) if small else (128, 640)
    tokens, heads, width = (2048, 8, 64) if small else (4096, 24, 128)
    features = heads * width
    kernels = [timer.random(channels, channels, 3, 3, dtype=dtype) for _ in range(ROUNDS)]
    weights = [timer.random(features, features, dtype=dtype) for _ in range(ROUNDS)]
    flops: dict[Work, float] = {
        "convolution": 2 * side**2 * channels**2 * 9,
        "product": 2 * tokens * features**2,
        "attention": 4 * heads * tokens**2 * width,
    }
    taken: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}  # of the results of `ELEMENTS`

    def timed(name: str, call: Callable[[], Tensor]) -> Tensor:
        timer.settle()
        began = time.perf_counter()
        result = call()
        timer.settle()
        taken.setdefault(name, []).append(time.perf_counter() - began)
        return result

    x, h = timer.random(1, channels, side, side, dtype=dtype), timer.random(1, tokens, features, dtype=dtype)
    for turn in range(ROUNDS + 1):
        if turn == 1:
            taken.clear()  # the first turn warms up
        kernel, weight = kernels[turn % ROUNDS], weights[turn % ROUNDS]
        y = timed("convolution", lambda k=kernel: F.conv2d(x, k, padding=1))
        y = timed("stream", lambda y=y: y + 1)
        q = timed("product", lambda w=weight: F.linear(h, w)).view(1, tokens, heads, width).transpose(1, 2)
        timed("attention", lambda q=q: F.scaled_dot_product_attention(q, q, q))
        for name, function in ELEMENTS:
            z = timed(name, lambda f=function: f(h))
            sizes[name] = z.numel()
    seconds = {name: statistics.mean(each) for name, each in taken.items()}  # a step has slow ones as well
    rates: dict[Work, float] = {work: flops[work] / seconds[work] for work in flops}
    elements = {name: size / seconds[name] for name, size in sizes.items()}
    return rates, 2 * y.nbytes / seconds["stream"], elements


def _tiny(timer: _Timer) -> tuple[float, float]:
    """Seconds that a kernel takes beside its work, and in which the host launches one."""
    x = torch.ones(16, device=timer.device)

    def many() -> None:
        for _ in range(TINY):
            x.add(1)

    if timer.device.type == "cpu":
        return timer.seconds(many) / TINY, 0.0
    many()
    timer.settle()
    began = time.perf_counter()
    many()
    launch = (time.perf_counter() - began) / TINY
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        many()
    return timer.seconds(graph.replay) / TINY, launch


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# -- writing ----------------------------------------------------------------------------------------------------------


def to_toml(device: Device, links: Mapping[str, Link]) -> str:
    """A device and links in the form of `targets.toml`."""
    return "\n".join(_table("devices", device) + [line for each in links.values() for line in _table("links", each)])


def _table(kind: str, entry: Device | Link) -> list[str]:
    name = entry.name if re.fullmatch(r"[A-Za-z0-9_-]+", entry.name) else json.dumps(entry.name)
    lines = [f"[{kind}.{name}]"]
    for each in fields(entry):
        value = getattr(entry, each.name)
        if each.name not in ("name", "sources", "inside") and value != each.default:
            lines.append(f"{each.name} = {_text(value)}")
    lines.append(f"[{kind}.{name}.sources]")
    return [*lines, *(f"{key} = {_text(value)}" for key, value in entry.sources.items()), ""]


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_text(each)}" for key, each in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_text, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"{value:.4g}" if isinstance(value, float) else str(value)
