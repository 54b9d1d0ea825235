"""Which values the search cuts, and along which dim; what it says where none can be."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxpass.capture import capture
from fxpass.ir.layout import Layout, even
from fxpass.ir.strategy import Strategy
from fxpass.make_plan import make_plan
from fxpass.passes.cuts import WorldSizeError
from fxpass.plan import Plan


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
    assert list(found.cuts.values()) == [Layout(1, even(16, 2))]


def test_a_grid_of_codes_is_cut_where_nothing_else_can_be() -> None:
    table, kernel = torch.randn(16, 4), torch.randn(3, 4, 3, 3)

    class Codes(nn.Module):
        def forward(self, codes: Tensor) -> Tensor:
            return torch.conv2d(nn.functional.embedding(codes, table).permute(0, 3, 1, 2), kernel, padding=1)

    found = make_plan(capture(Codes(), torch.randint(16, (1, 8, 8))), 2, Strategy.of("sync"))
    assert list(found.cuts.values()) == [Layout(1, even(8, 2))]
    assert not found.fallbacks


def test_a_dim_that_needs_no_gathering_is_taken_before_one_that_does() -> None:
    kernel = torch.randn(4, 4, 1, 1)
    found = plan(lambda x: torch.conv2d(x + x.sin().sort(2)[0][:, :, :1], kernel), 2, 4, 16, 16)
    assert list(found.cuts.values()) == [Layout(3, even(16, 2))]
    assert not found.fallbacks


def test_a_model_of_no_flops_is_cut_as_any_other() -> None:
    assert list(plan(torch.sin, 1, 4, 8).cuts.values()) == [Layout(1, even(4, 2))]


def test_a_stream_made_inside_is_cut_beside_the_input() -> None:
    weight = torch.randn(64, 64)

    class Joined(nn.Module):
        def forward(self, x: Tensor, text: Tensor) -> Tensor:
            text = nn.functional.pad(text, (0, 0, 0, 26))[None]  # the text itself has too few rows, and no batch
            joined = torch.cat([text @ weight, x @ weight], 1)
            return nn.functional.scaled_dot_product_attention(joined @ weight, joined @ weight, joined)[:, 32:]

    found = make_plan(capture(Joined(), torch.randn(1, 32, 64), torch.randn(6, 64)), 4, Strategy.of("sync"))
    assert found.bound > 3.9


def test_inputs_of_one_shape_are_cut_together() -> None:
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


def test_the_faster_of_two_even_cuts_wins_although_more_of_its_few_bytes_only_move_the_cuts() -> None:
    width = 384

    class Layer(nn.Module):
        """Tokens attend to themselves and to a condition."""

        def __init__(self) -> None:
            super().__init__()
            self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
            self.both = nn.Linear(width, 2 * width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x: Tensor, condition: Tensor) -> Tensor:
            key, value = self.both(torch.cat([x, condition], 1)).chunk(2, -1)
            x = x + self.out(nn.functional.scaled_dot_product_attention(self.query(x), key, value))
            return x + self.down(self.up(x).relu())

    class Patches(nn.Module):
        """Patches of 2x2 pixels: 5 rows and 9 columns of tokens, which two ranks cannot share evenly."""

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.unembed = nn.Conv2d(4, width, 2, 2), nn.Linear(width, 16)
            self.layers = nn.ModuleList(Layer() for _ in range(12))

        def forward(self, x: Tensor, condition: Tensor) -> Tensor:
            tokens = self.embed(x).flatten(2).transpose(1, 2)
            for layer in self.layers:
                tokens = layer(tokens, condition)
            return nn.functional.pixel_shuffle(self.unembed(tokens).transpose(1, 2).unflatten(2, (5, 9)), 2)

    program = capture(Patches().eval(), torch.randn(1, 4, 10, 18), torch.randn(1, 1024, width))
    found = make_plan(program, 2, Strategy.of("sync"))
    assert found.bound > 1.9


def refused(model: nn.Module, *inputs: Tensor, world: int) -> str:
    with pytest.raises(WorldSizeError) as caught:
        make_plan(capture(model.eval(), *inputs), world, Strategy.of("sync"))
    return str(caught.value)


class Encoded(nn.Module):
    """An image, and an encoder of a condition that has no rows to cut."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.Linear(256, 4))
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.conv(x) + self.encoder(condition)[:, :, None, None]


def test_an_encoder_that_every_rank_runs_whole_is_named_with_its_share_of_the_work() -> None:
    message = refused(Encoded(), torch.randn(2, 4, 16, 16), torch.randn(2, 256), world=4)
    assert "too few rows" not in message
    assert "the module 'encoder' runs whole on every rank, which is 97% of the work" in message
    assert "does not depend on the rows that are cut" in message


def test_the_reason_for_replicated_work_is_not_that_of_a_light_operator() -> None:
    class Sorted(Encoded):
        def forward(self, x: Tensor, condition: Tensor) -> Tensor:
            flat = torch.linalg.svd(super().forward(x.sin(), condition)[:, 0])[1]
            return super().forward(x, condition) + flat[:, None, :, None]

    message = refused(Sorted(), torch.randn(2, 4, 16, 16), torch.randn(2, 256), world=4)
    assert "the module 'encoder' runs whole" in message
    assert "does not depend on the rows that are cut" in message


def test_an_operator_that_is_gathered_is_named_with_the_reason() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Conv1d(16, 16, 1)  # the tokens are its channels

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mix(x.sin())

    message = refused(Mixed(), torch.randn(1, 16, 1), world=4)
    assert "the module 'mix' runs whole on every rank, which is 100% of the work" in message
    assert "channels are split" in message


def test_an_error_about_too_few_rows_says_how_many_there_are() -> None:
    message = refused(nn.Conv2d(4, 4, 1), torch.randn(2, 4, 3, 3), world=5)
    assert "its inputs have too few rows, at most 4; at most 3 ranks would do" in message


def test_an_operator_of_fewer_rows_than_ranks_is_named() -> None:
    class Coarse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Conv2d(3, 3, 1, stride=4)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(x.sin())

    message = refused(Coarse(), torch.randn(1, 3, 8, 8), world=4)
    assert "the module 'down' runs whole on every rank, which is 100% of the work" in message
    assert "fewer rows" in message
