"""The ideal that `balance` compares plans with, on models whose work is counted by hand."""

import pytest
import torch
from torch import Tensor, nn

import fxpass
from fxpass.tools.sweeps.balance import Balance, ideal, table


class Conditioned(nn.Module):
    """A convolution, scaled by a function of a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 1)
        self.time = nn.Linear(5, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.conv(x) * self.time(t)[:, :, None, None]


def test_the_ideal_replicates_work_without_rows_and_rounds_rows_up() -> None:
    made = fxpass.plan(Conditioned(), torch.randn(1, 2, 9, 6), torch.randn(1, 5), world_size=4)
    time, conv = 2 * 3 * 5, 2 * 3 * 2 * 9 * 6  # 9 rows: at most 3 of them; 6 columns: at most 2; both a third
    assert made.flops_total == time + conv
    assert ideal(made) == pytest.approx((time + conv) / (time + conv / 3))
    assert made.bound == pytest.approx(ideal(made))


def test_the_ideal_uses_the_dim_that_divides_best_regardless_of_the_plan() -> None:
    made = fxpass.plan(nn.Linear(4, 4), torch.randn(1, 9, 8, 4), world_size=4)
    assert ideal(made) == pytest.approx(4)


def test_the_table_marks_plans_that_miss_the_aim() -> None:
    good = Balance("even", 8, 7.6, 8.0, 0.001, 0, 3, 1.0, 2.0, 0, "")
    bad = Balance("uneven", 8, 6.9, 8.0, 0.001, 0, 3, 1.0, 2.0, 0, "")
    few = Balance("few rows", 8, 5.95, 6.0, 0.001, 0, 3, 1.0, 2.0, 0, "")
    marked = [line.endswith("under the aim |") for line in table([good, bad, few])[2:]]
    assert marked == [False, True, False]
