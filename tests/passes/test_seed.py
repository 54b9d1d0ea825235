"""Which values the search cuts, and along which dim."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fxpass.capture import capture
from fxpass.ir.layout import Layout, even
from fxpass.plan import Plan, make_plan
from fxpass.strategy import Strategy


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def plan(function: Callable[[Tensor], Tensor], *shape: int, world: int = 2) -> Plan:
    return make_plan(capture(Function(function), torch.randn(*shape)), world, Strategy.of("sync"))


def test_a_signal_without_channels_is_cut_along_its_samples() -> None:
    kernel = torch.randn(4, 1, 3)
    found = plan(lambda x: torch.conv1d(x[:, None], kernel, padding=1), 2, 16)
    assert list(found.seeds.values()) == [Layout(1, even(16, 2))]


def test_a_dim_that_needs_no_gathering_is_taken_before_one_that_does() -> None:
    kernel = torch.randn(4, 4, 1, 1)
    found = plan(lambda x: torch.conv2d(x + x.sin().sort(2)[0][:, :, :1], kernel), 2, 4, 16, 16)
    assert list(found.seeds.values()) == [Layout(3, even(16, 2))]
    assert not found.fallbacks


def test_a_model_of_no_flops_is_cut_as_any_other() -> None:
    assert list(plan(torch.sin, 1, 4, 8).seeds.values()) == [Layout(1, even(4, 2))]


def test_a_stream_made_inside_is_cut_beside_the_input() -> None:
    weight = torch.randn(64, 64)

    class Joined(nn.Module):
        def forward(self, x: Tensor, text: Tensor) -> Tensor:
            text = nn.functional.pad(text, (0, 0, 0, 26))[None]  # the text itself has too few rows, and no batch
            joined = torch.cat([text @ weight, x @ weight], 1)
            return nn.functional.scaled_dot_product_attention(joined @ weight, joined @ weight, joined)[:, 32:]

    found = make_plan(capture(Joined(), torch.randn(1, 32, 64), torch.randn(6, 64)), 4, Strategy.of("sync"))
    assert found.bound > 3.9


def test_inputs_of_one_shape_join_together() -> None:
    kernel = torch.randn(8, 8, 3, 3)

    class Guided(nn.Module):
        def forward(self, x: Tensor, *hints: Tensor) -> Tensor:
            for hint in hints:
                x = x + nn.functional.group_norm(torch.conv2d(hint, kernel, padding=1), 2)
            for _ in range(4):
                x = torch.conv2d(x, kernel, padding=1)
            return x

    found = make_plan(capture(Guided(), *(torch.randn(1, 8, 8, 8) for _ in range(4))), 2, Strategy.of("sync"))
    assert found.bound == 2.0
