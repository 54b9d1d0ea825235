"""Bytes of SDXL at 1024² on 8 ranks, compared with DistriFusion and PCPP, as in docs/traffic.md."""

import pytest
import torch

import fxpass
from fxpass.ir.program import Program
from fxpass.models.resolve import Options, resolve
from fxpass.plan import Plan
from fxpass.tools.sweeps.traffic import RANKS, Traffic, distrifusion, ours

NUMBER, BRANCHES = 2, 2  # bytes of a number; guidance branches


@pytest.fixture(scope="module")
def program() -> Program:
    model = resolve("sdxl", Options(height=1024, width=1024, batch=BRANCHES, dtype=torch.float16))
    return fxpass.capture(model.module, *model.args, **model.kwargs)


@pytest.fixture(scope="module")
def displaced(program: Program) -> Plan:
    return fxpass.plan(program, world_size=RANKS, strategy="displaced", target="gpu")


@pytest.fixture(scope="module")
def theirs(displaced: Plan) -> Traffic:
    return distrifusion(displaced)


def test_distrifusion_receives_all_others_keys_and_values(theirs: Traffic) -> None:
    # 10 layers of attention on 64 x 64 tokens of 640 channels, 60 on 32 x 32 of 1280, each with keys and values
    numbers = 2 * (10 * 64 * 64 * 640 + 60 * 32 * 32 * 1280)
    assert theirs.keys_values == numbers * NUMBER * BRANCHES * (RANKS - 1) // RANKS


def test_distrifusion_receives_two_border_rows_of_all_others(displaced: Plan, theirs: Traffic) -> None:
    convolutions = [n for n in displaced.program.graph.nodes if n.target is torch.ops.aten.convolution.default]
    shapes = [[each.meta["val"].shape for each in node.args[:2]] for node in convolutions]
    bordered = [x for x, weight in shapes if weight[-1] == 3][1:]  # the first one slices its input
    numbers = 2 * sum(channels * width for _, channels, _, width in bordered)
    assert theirs.halo == numbers * NUMBER * BRANCHES * (RANKS - 1)


def test_a_displaced_step_receives_no_more_than_distrifusions(displaced: Plan, theirs: Traffic) -> None:
    mine = ours(displaced)
    assert 0 < mine.keys_values <= theirs.keys_values
    assert 0 < mine.halo <= theirs.halo / (RANKS - 1)
    received = max(sum(displaced.bytes_received(rank, exact=False).values()) for rank in range(RANKS))
    assert received - mine.keys_values - mine.halo < 0.005 * received  # moments and the output


def test_pcpp_receives_a_tenth_of_the_keys_and_values(program: Program, theirs: Traffic) -> None:
    made = fxpass.plan(program, world_size=RANKS, strategy="pcpp", target="gpu")
    assert made.strategy.window == 0.3
    assert 0 < ours(made).keys_values <= 0.1 * theirs.keys_values
