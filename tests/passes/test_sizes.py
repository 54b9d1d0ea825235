"""What a refusal says: the largest number of ranks, and the smallest input for the number that was asked for."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxpass.capture import capture
from fxpass.ir.strategy import Strategy
from fxpass.make_plan import make_plan
from fxpass.models.small import case
from fxpass.passes.limits import WorldSizeError
from fxpass.passes.sizes import Level, Sizes


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, stride, 1)


class Down(nn.Module):
    """Samples down by 4; nine tenths of the work is on the coarsest level."""

    step = 4

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(conv(4, 8), conv(8, 16, 2), conv(16, 64, 2), conv(64, 64), conv(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class UNet(nn.Module):
    """Two levels and a skip connection; most of the work is on the inner one."""

    step = 2

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down, self.last = conv(4, 8), conv(8, 64, 2), conv(72, 4)
        self.inner = nn.Sequential(*(conv(64, 64) for _ in range(6)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        inner = nn.functional.interpolate(self.inner(self.down(x)), scale_factor=2.0)
        return self.last(torch.cat([x, inner], 1))


class Unshuffled(nn.Module):
    """Packs 4 x 4 pixels into channels."""

    step = 4

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.PixelUnshuffle(4), conv(64, 64), conv(64, 64), nn.PixelShuffle(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Patches(nn.Module):
    """Tokens of 4 x 4 pixels, and attention between them."""

    step = 4

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.project, self.out = nn.Conv2d(4, 32, 4, 4), nn.Linear(32, 96), nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[2] // 4
        tokens = self.embed(x).flatten(2).mT
        for _ in range(3):
            tokens = tokens + nn.functional.scaled_dot_product_attention(*self.project(tokens).chunk(3, -1))
        return nn.functional.pixel_shuffle(self.out(tokens).mT.unflatten(2, (rows, -1)), 4)


def refusal(model: nn.Module, height: int, world: int, width: int = 4) -> str:
    """The error for an input of this size; empty if so many ranks can share it."""
    program = capture(model.eval(), torch.randn(1, 4, height, width))
    try:
        make_plan(program, world, Strategy.of("sync"))
    except WorldSizeError as error:
        return str(error)
    return ""


MODELS = [Down, UNet, Unshuffled, Patches]


@pytest.mark.parametrize(
    ("make", "world"), [(Down, 5), (Down, 16), (UNet, 5), (UNet, 16), (Unshuffled, 5), (Unshuffled, 16), (Patches, 16)]
)
def test_a_refusal_names_the_smallest_height_that_would_do(make: Any, world: int) -> None:
    torch.manual_seed(0)
    model = make()
    message = refusal(model, 8, world)
    found = re.search(rf"{world} ranks need 'x' with an estimated (\d+) rows along dim 2 \(it has 8\)", message)
    assert found, message
    height = int(found[1])
    assert height > 8
    assert not refusal(model, height, world)
    assert refusal(model, height - model.step, world)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("height", [8, 16, 32])
def test_a_refusal_names_the_largest_number_of_ranks_that_would_do(make: Any, height: int) -> None:
    torch.manual_seed(0)
    model = make()
    message = refusal(model, height, 64)
    found = re.search(r"at most (\d+) ranks would do", message)
    assert found, message
    most = int(found[1])
    assert not refusal(model, height, most)
    assert refusal(model, height, most + 1)


def test_an_input_that_two_ranks_cannot_share_has_a_smallest_height() -> None:
    torch.manual_seed(0)
    message = refusal(Down(), 4, 2, width=3)
    assert "run it on one rank, and 2 ranks need 'x' with an estimated 8 rows along dim 2 (it has 4)" in message
    assert not refusal(Down(), 8, 2, width=3)


def test_a_refusal_names_each_dim_that_could_be_longer() -> None:
    model = case("unet_sd").build()
    with pytest.raises(WorldSizeError) as caught:
        make_plan(capture(model, **case("unet_sd").inputs(rows=8)), 32, Strategy.of("sync"))
    text = str(caught.value)
    assert (
        "32 ranks need 'sample' with an estimated 32 rows along dim 2 (it has 8) or 32 rows along dim 3 (it has 16)"
        in text
    )


def test_a_model_without_floating_point_operations_is_refused_for_its_few_rows() -> None:
    class Flip(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flip(2)

    assert "at most 8 ranks would do" in refusal(Flip(), 8, 16)


def test_rows_at_another_size_are_whole_numbers() -> None:
    sizes = Sizes("x", 2, 98, 0, {Level(49, 49, 1): 1000})
    assert [sizes.bound(2 * rows, 2, (1,)) for rows in (2, 4, 14)] == [2.0, 2.0, 2.0]


def test_no_size_is_named_where_the_rows_do_not_matter() -> None:
    """All work but a thousandth is on a condition that has no rows to cut."""

    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(4)))

        def forward(self, x: Tensor, condition: Tensor) -> Tensor:
            return conv_1(x) + self.encoder(condition).mean()

    conv_1 = nn.Conv2d(4, 1, 1)
    program = capture(Conditioned().eval(), torch.randn(1, 4, 8, 4), torch.randn(1, 2048))
    with pytest.raises(WorldSizeError) as caught:
        make_plan(program, 2, Strategy.of("sync"))
    assert "run it on one rank (the best cut" in str(caught.value)


def test_no_size_is_named_along_channels() -> None:
    """A convolution, whose channels are given, and a tenth of the work in attention between channels."""

    class Channels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            each = x.flatten(2)
            return self.conv(x) + nn.functional.scaled_dot_product_attention(each, each, each).view_as(x)

    text = refusal(Channels(), 8, 64)
    assert "along dim 2" in text
    assert "along dim 1" not in text


def test_a_mask_that_is_cut_with_the_rows_does_not_hide_a_coarser_level() -> None:
    """Attention between the rows of a level that is sampled down: half of the work, on half of the rows."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.last = nn.Conv2d(4, 32, 3, 2, 1), conv(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.down(x).flatten(2).mT
            mask = torch.eye(tokens.shape[1], dtype=torch.bool)
            for _ in range(8):
                tokens = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens, mask)
            return self.last(x) + tokens.mean()

    model = Masked()
    for world in (8, 16):
        found = re.search(r"an estimated (\d+) rows along dim 2", refusal(model, 4, world))
        assert found
        assert not refusal(model, int(found[1]), world)
