"""The ideal that `balance` measures plans against, on models whose work is counted by hand."""

import pytest
import torch
from torch import Tensor, nn

import fxpass
from fxpass.tools.sweeps.balance import Balance, ideal, table


class Conditioned(nn.Module):
    """Rows through a convolution, scaled by what a vector says."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 1)
        self.time = nn.Linear(5, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.conv(x) * self.time(t)[:, :, None, None]


def test_the_ideal_replicates_what_no_rows_reach_and_rounds_rows_up() -> None:
    made = fxpass.plan(Conditioned(), torch.randn(1, 2, 9, 6), torch.randn(1, 5), world_size=4)
    time, conv = 2 * 3 * 5, 2 * 3 * 2 * 9 * 6  # 9 rows: at most 3 of them; 6 columns: at most 2; both a third
    assert made.flops_total == time + conv
    assert ideal(made) == pytest.approx((time + conv) / (time + conv / 3))
    assert made.bound == pytest.approx(ideal(made))


def test_the_ideal_takes_the_dim_that_is_shared_best_whatever_the_plan_does() -> None:
    made = fxpass.plan(nn.Linear(4, 4), torch.randn(1, 9, 8, 4), world_size=4)
    assert ideal(made) == pytest.approx(4)


def test_the_table_says_what_is_under_the_aim() -> None:
    good = Balance("even", 8, 7.6, 8.0, 0.001, 0, 3, 1.0, 2.0, 0, "")
    bad = Balance("uneven", 8, 6.9, 8.0, 0.001, 0, 3, 1.0, 2.0, 0, "")
    few = Balance("few rows", 8, 5.95, 6.0, 0.001, 0, 3, 1.0, 2.0, 0, "")
    marked = [line.endswith("under the aim |") for line in table([good, bad, few])[2:]]
    assert marked == [False, True, False]
