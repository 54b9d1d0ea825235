"""Random small denoisers on random cuts equal the unsplit network: rules in combination."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.passes.displaced import PRESETS, follow
from tests.passes.harness import cut, layouts, split, tolerance
from tests.properties import examples, given

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


def sampled(x: Tensor) -> Tensor:
    grid = x[:, :2].permute(0, 2, 3, 1).tanh()
    return F.grid_sample(x, grid, align_corners=False)


def looked_up(x: Tensor) -> Tensor:
    order = x.mean((0, 1, 3)).argsort()
    return x[:, :, order] + x.gather(3, x.argsort(3)) + x.index_select(2, order.flip(0))


def added_up(x: Tensor) -> Tensor:
    place = (x > 0).long().cumsum(2).clamp(max=x.shape[2] - 1)
    return torch.zeros_like(x).scatter_add(2, place, x) + x.index_add(3, torch.zeros_like(place[0, 0, 0]), x)


def unfolded(x: Tensor) -> Tensor:
    columns = F.unfold(x, 3, padding=1)
    return F.fold(columns * columns.mean(1, keepdim=True), x.shape[2:], 3, padding=1) / 9


def filtered(x: Tensor) -> Tensor:
    waves = torch.fft.rfft2(x, norm="ortho")
    return torch.fft.irfft2(waves * waves.abs().tanh(), s=x.shape[-2:], norm="ortho")


def handmade(x: Tensor) -> Tensor:
    tokens = x.flatten(2)
    weights = torch.softmax(torch.bmm(tokens.transpose(1, 2), tokens) * 0.3, -1)
    return torch.bmm(tokens, weights.transpose(1, 2)).view_as(x)


def attended(x: Tensor, blocks: bool) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)[:, None]
    place = torch.arange(tokens.shape[2]) // 3
    named: dict[str, Any] = {"attn_mask": place[:, None] == place} if blocks else {"is_causal": True}
    y = F.scaled_dot_product_attention(tokens, tokens, tokens.flip(-1), **named)
    return y[:, 0].transpose(1, 2).reshape(x.shape)


def turned(x: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.flatten(2).transpose(1, 2).unflatten(2, (2, 2)).contiguous())
    angles = torch.arange(pairs.shape[1], dtype=x.dtype)[:, None] / torch.tensor([1.0, 3.0], dtype=x.dtype)
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(2).mT.reshape(x.shape)


def resized(mode: str, **named: Any) -> Any:
    def function(x: Tensor) -> Tensor:
        small = F.interpolate(x, (x.shape[2] // 2 + 1, x.shape[3] // 2 + 1), mode=mode, **named)
        return F.interpolate(small, x.shape[2:], mode=mode, **named)

    return function


#: one operator of each family, from a picture to one of the same size
OTHERS: dict[str, Any] = {
    "softmax of rows": lambda x: x.softmax(2),
    "softmax of all": lambda x: x.flatten(1).log_softmax(1).view_as(x),
    "logsumexp": lambda x: x - x.logsumexp((2, 3), keepdim=True),
    "cumsum": lambda x: x.cumsum(2) / x.shape[2] + x.cumsum(3) / x.shape[3],
    "largest": lambda x: x * x.argmax(2, keepdim=True) / x.shape[2] + x.max(3, keepdim=True).values,
    "largest few": lambda x: x - x.topk(2, 2).values.mean(2, keepdim=True) + x.topk(3, 1).values.sum(1, keepdim=True),
    "adaptive": lambda x: x + F.interpolate(F.adaptive_max_pool2d(x, (2, 1)), x.shape[2:]),
    "causal": lambda x: attended(x, blocks=False),
    "blocks": lambda x: attended(x, blocks=True),
    "turned": turned,
    "antialiased": resized("bilinear", antialias=True),
    "sorted": lambda x: x.sort(2).values,
    "looked up": looked_up,
    "added up": added_up,
    "masked": lambda x: torch.where(x > x.mean(), x, 0.5).tril(1) + x.triu(-1),
    "diagonal": lambda x: x + x.flatten(1)[:, :16].view(-1, 4, 4).diagonal(0, 1, 2)[:, :, None, None],
    "unfolded": unfolded,
    "filtered": filtered,
    "handmade": handmade,
    "sampled": sampled,
    "bicubic": resized("bicubic", align_corners=True),
    "area": resized("area"),
    "nearest-exact": resized("nearest-exact"),
    "pooled": lambda x: x * F.adaptive_avg_pool2d(x, 1) + F.avg_pool2d(x, 3, 1, 1) + F.max_pool2d(x, 3, 1, 1),
    "rms": lambda x: F.rms_norm(x, x.shape[2:]),
    "instance": F.instance_norm,
    "batch": lambda x: F.batch_norm(x, torch.zeros(4).to(x), torch.ones(4).to(x)),
    "local response": lambda x: F.local_response_norm(x, 3),
    "shuffled": lambda x: F.channel_shuffle(x, 2).flip(2).roll((1, 2), (2, 3)),
    "einsum": lambda x: torch.einsum("...hw,...hv->...wv", x, x).mean((2, 3), keepdim=True) * x,
    "complex": lambda x: torch.view_as_real(torch.polar(x.abs(), x)).sum(-1),
    "gated": lambda x: F.glu(torch.cat([x, x.flip(3)], 3), 3) + F.prelu(x, x.new_full((4,), 0.2)),
}


class Other(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor, text: Tensor, time: Tensor) -> Tensor:
        return OTHERS[self.name](x)

    def extra_repr(self) -> str:
        return self.name


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
    """A block's values, brought below 8: chains of blocks would else amplify rounding (angles of 100, cubes of cubes).

    The function is smooth and never flat, so that a wrong value stays another value.
    """
    y = block(x, text, time)
    return y / (1 + y.abs() / 8)


@st.composite
def blocks(draw: st.DrawFn, height: int, width: int, depth: int) -> nn.Module:
    can_pool = depth > 0 and height % 4 == 0 and width % 4 == 0
    kinds = ["conv", "attention", "windows", "statistics", "axial", *["other"] * 4, *["pooled"] * 3 * can_pool]
    kind = draw(st.sampled_from(kinds))
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
    elif kind == "other":
        block = Other(draw(st.sampled_from(sorted(OTHERS))))
    elif kind == "axial":
        dim = draw(st.sampled_from([2, 3]))
        block = Axial((height, width)[dim - 2], dim)
    else:
        inner = [draw(blocks(height // 2, width // 2, depth - 1)) for _ in range(draw(st.integers(0, 2)))]
        downs, ups = ["conv", "uneven", "average", "unshuffle"], ["nearest", "bilinear", "transposed", "shuffle"]
        block = Pooled(draw(st.sampled_from(downs)), draw(st.sampled_from(ups)), inner)
    return Residual(block) if draw(st.booleans()) else block


def check(data: st.DataObject, kinds: str, displaced: bool = False) -> None:
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
    if displaced:
        follow(network, inputs, cuts, world, data.draw(st.sampled_from(PRESETS), label="strategy"))
    else:
        split(network, inputs, cuts, world, exact=False)


@pytest.mark.parametrize("name", OTHERS)
def test_an_operator_of_each_family_on_rows_and_columns_equals_the_whole(name: str) -> None:
    for rows in (cut(2, (0, 3), (3, 8)), cut(3, (0, 4), (3, 6)), cut(2, [0, 3, 4, 7], [1, 2, 5, 6])):
        split(OTHERS[name], [torch.randn(2, CHANNELS, 8, 6, dtype=torch.float64)], {0: rows}, 2, exact=False)


def test_rounding_does_not_grow_from_block_to_block() -> None:
    blocks = [Residual(Other("einsum")), Residual(Other("einsum")), Other("complex")]
    inputs = [torch.randn(s, dtype=torch.float64) for s in ((2, CHANNELS, 8, 4), (2, 5, CHANNELS), (2, 3))]
    for rows in (cut(2, (0, 3), (3, 8)), cut(3, (0, 1), (1, 4))):
        found = split(Network(blocks, packed=False), inputs, {0: rows}, 2, exact=False)
        assert found.error < tolerance(torch.float64) / 10


def test_rounding_that_a_normalization_amplifies_is_no_failure() -> None:
    def normalized(x: Tensor) -> Tensor:  # torch's kernel for channels last takes the difference of two large sums
        return F.group_norm((1 + x / 1000).permute(0, 3, 1, 2), 4)

    found = split(normalized, [torch.randn(2, 8, 4, 4, dtype=torch.float64)], {0: cut(1, (0, 3), (3, 8))}, 2)
    assert found.error > tolerance(torch.float64)


@examples(25)
@given(st.data())
def test_a_random_network_on_random_cuts_equals_the_whole(data: st.DataObject) -> None:
    check(data, "uneven overlapping")


@pytest.mark.slow
@examples(300)
@given(st.data())
def test_many_random_networks_on_cuts_of_any_kind_equal_the_whole(data: st.DataObject) -> None:
    check(data, "uneven overlapping strided any")


@examples(15)
@given(st.data())
def test_displaced_steps_of_a_random_network_equal_exact_ones_on_equal_inputs_and_all_ranks_agree(
    data: st.DataObject,
) -> None:
    check(data, "uneven overlapping", displaced=True)


@pytest.mark.slow
@examples(200)
@given(st.data())
def test_displaced_steps_of_many_random_networks_keep_law_4(data: st.DataObject) -> None:
    check(data, "uneven overlapping strided any", displaced=True)
