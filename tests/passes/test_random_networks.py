"""Random small denoisers, cut at random, against the whole: what rules do to each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.passes.examples import examples
from tests.passes.harness import layouts, split

CHANNELS = 4


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, text: Tensor, time: Tensor) -> Tensor:
        return x + apply(self.inner, x, text, time)


class Conv(nn.Module):
    """Norm, activation, convolution of any kernel and dilation, scaled and shifted by the timestep."""

    def __init__(self, kernel: int, dilation: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, CHANNELS)
        self.time = nn.Linear(3, 2 * CHANNELS)
        padding = dilation * (kernel - 1) // 2
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, kernel, padding=padding, dilation=dilation, groups=groups)

    def forward(self, x: Tensor, text: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.time(time)[:, :, None, None].chunk(2, 1)
        return self.conv(F.silu(self.norm(x) * (1 + scale) + shift))


class Attention(nn.Module):
    """Over all tokens, the text's, or both joined; softmax or linear; with or without positions."""

    def __init__(self, kind: str, heads: int, rotate: bool) -> None:
        super().__init__()
        self.kind, self.heads, self.rotate = kind, heads, rotate
        self.norm = nn.LayerNorm(CHANNELS, elementwise_affine=False)
        self.query, self.key, self.value, self.out = (nn.Linear(CHANNELS, CHANNELS) for _ in range(4))

    def forward(self, x: Tensor, text: Tensor, time: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        source = {"cross": text, "joint": torch.cat([text, tokens], 1)}.get(self.kind, tokens)
        query = source if self.kind == "joint" else tokens
        q, k, v = (
            f(t).view(b, -1, self.heads, c // self.heads).transpose(1, 2)
            for f, t in ((self.query, query), (self.key, source), (self.value, source))
        )
        if self.rotate:
            q, k = rotated(q), rotated(k)
        if self.kind == "linear":
            q, k = q.softmax(-1), F.relu(k)
            y = q @ (k.transpose(-1, -2) @ v) / (k.sum(-2, keepdim=True) * q).sum(-1, keepdim=True).add(1)
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        y = self.out(y.transpose(1, 2).reshape(b, -1, c))
        y = y[:, text.shape[1] :] if self.kind == "joint" else y
        return y.transpose(1, 2).reshape(b, c, h, w)


def rotated(x: Tensor) -> Tensor:
    angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] / torch.arange(1, x.shape[-1] + 1, dtype=x.dtype)
    return x * angles.cos() + x.roll(1, -1) * angles.sin()


class Windows(nn.Module):
    """Attention within 2 x 2 windows, which may be shifted."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift = shift
        self.mix = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor, text: Tensor, time: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = x.roll((-self.shift, -self.shift), (2, 3)) if self.shift else x
        y = y.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, c)
        y = F.scaled_dot_product_attention(self.mix(y), y, y)
        y = y.view(b, h // 2, w // 2, 2, 2, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)
        return y.roll((self.shift, self.shift), (2, 3)) if self.shift else y


class Pooled(nn.Module):
    """Down, something, up, and a skip connection."""

    def __init__(self, down: str, up: str, inner: list[nn.Module]) -> None:
        super().__init__()
        self.inner = nn.ModuleList(inner)
        self.down: Any = {
            "conv": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1),
            "uneven": lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2)),
            "average": lambda: nn.AvgPool2d(2),
            "unshuffle": lambda: nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * CHANNELS, CHANNELS, 1)),
        }[down]()
        self.up: Any = {
            "nearest": lambda: nn.Upsample(scale_factor=2.0),
            "bilinear": lambda: nn.Upsample(scale_factor=2.0, mode="bilinear"),
            "transposed": lambda: nn.ConvTranspose2d(CHANNELS, CHANNELS, 4, stride=2, padding=1),
            "shuffle": lambda: nn.Sequential(nn.Conv2d(CHANNELS, 4 * CHANNELS, 1), nn.PixelShuffle(2)),
        }[up]()
        self.join = nn.Conv2d(2 * CHANNELS, CHANNELS, 1)

    def forward(self, x: Tensor, text: Tensor, time: Tensor) -> Tensor:
        y = self.down(x)
        for inner in self.inner:
            y = apply(inner, y, text, time)
        return self.join(torch.cat([self.up(y), x], 1))


class Statistics(nn.Module):
    """Gates from means, maxima and norms over the picture."""

    def forward(self, x: Tensor, text: Tensor, time: Tensor) -> Tensor:
        mean, largest = x.mean((2, 3), keepdim=True), x.amax(-2, keepdim=True)
        spread = x.std((1, 2, 3), keepdim=True) + 1
        unit = F.normalize(x, dim=2) + F.normalize(x, dim=1)
        return (x - mean) / spread + torch.sigmoid(largest) * unit + text.mean((1, 2))[:, None, None, None]


class Axial(nn.Module):
    """A linear layer along the rows or the columns: what is split is mixed."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.mix = nn.Linear(size, size)

    def forward(self, x: Tensor, text: Tensor, time: Tensor) -> Tensor:
        return self.mix(x.transpose(self.dim, -1)).transpose(self.dim, -1)


class Network(nn.Module):
    def __init__(self, blocks: list[nn.Module], packed: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.packed = packed

    def forward(self, x: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            x = apply(block, x, text, time)
        if self.packed:  # as tokens of 2 x 2 pixels
            b, c, h, w = x.shape
            x = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, 4 * c)
        return x, text * 2

    def extra_repr(self) -> str:
        return f"packed={self.packed}"


def apply(block: nn.Module, x: Tensor, text: Tensor, time: Tensor) -> Tensor:
    return block(x, text, time)


@st.composite
def blocks(draw: st.DrawFn, height: int, width: int, depth: int) -> nn.Module:
    can_pool = depth > 0 and height % 4 == 0 and width % 4 == 0
    kind = draw(st.sampled_from(["conv", "attention", "windows", "statistics", "axial", *(["pooled"] * 3 * can_pool)]))
    if kind == "conv":
        modes = st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"])
        block: nn.Module = Conv(
            draw(st.sampled_from([1, 3, 5])), draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 4]))
        )
        if min(height, width) > 4:
            block.conv.padding_mode = draw(modes)
    elif kind == "attention":
        kinds = st.sampled_from(["self", "cross", "joint", "linear"])
        block = Attention(draw(kinds), draw(st.sampled_from([1, 2])), draw(st.booleans()))
    elif kind == "windows":
        block = Windows(draw(st.integers(0, 1)))
    elif kind == "statistics":
        block = Statistics()
    elif kind == "axial":
        dim = draw(st.sampled_from([2, 3]))
        block = Axial((height, width)[dim - 2], dim)
    else:
        inner = [draw(blocks(height // 2, width // 2, depth - 1)) for _ in range(draw(st.integers(0, 2)))]
        downs, ups = ["conv", "uneven", "average", "unshuffle"], ["nearest", "bilinear", "transposed", "shuffle"]
        block = Pooled(draw(st.sampled_from(downs)), draw(st.sampled_from(ups)), inner)
    return Residual(block) if draw(st.booleans()) else block


def check(data: st.DataObject, kinds: str) -> None:
    height, width = data.draw(st.sampled_from([(8, 4), (8, 8), (12, 4), (16, 4)]), label="size")
    count = data.draw(st.integers(1, 4))
    network = Network([data.draw(blocks(height, width, 2)) for _ in range(count)], data.draw(st.booleans())).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.5)
    inputs = [torch.randn(s, dtype=torch.float64) for s in ((2, CHANNELS, height, width), (2, 5, CHANNELS), (2, 3))]
    world = data.draw(st.integers(1, 5), label="world")
    cuts = {}
    if world <= max(height, width):
        cuts[0] = data.draw(layouts(inputs[0].shape, world, kinds=kinds), label="cut of the picture")
    if world <= 5 and data.draw(st.booleans(), label="split the text"):
        cuts[1] = data.draw(layouts(inputs[1].shape, world, dims=[1], kinds=kinds), label="cut of the text")
    split(network, inputs, cuts, world, exact=False)


@examples(25)
@given(st.data())
def test_a_random_network_on_random_cuts_equals_the_whole(data: st.DataObject) -> None:
    check(data, "uneven overlapping")


@pytest.mark.slow
@examples(300)
@given(st.data())
def test_many_random_networks_on_cuts_of_any_kind_equal_the_whole(data: st.DataObject) -> None:
    check(data, "uneven overlapping strided any")
