"""Local exchanges, of which a displaced step uses the own part alone, against a reference written by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import fxpass
from fxpass.ir.fetch import Fetch
from fxpass.ir.layout import Rows
from fxpass.ir.strategy import Strategy
from tests.runtime.plans import Block, block, steps, whole

LOCAL = Strategy("local", "local", "local", "local", "local", warmup_steps=2)


def rows_of(x: Tensor, own: np.ndarray, wanted: np.ndarray, size: int) -> Tensor:
    """The wanted rows of a value of which only the rows `own` are there: beyond the picture 0, else the nearest."""
    found = []
    for row in wanted:
        if not 0 <= row < size:
            found.append(torch.zeros_like(x[:, :, :1]))
        else:
            place = int(np.abs(own - row).argmin())  # of two, the one before
            found.append(x[:, :, place : place + 1])
    return torch.cat(found, 2)


def alone(model: Block, sample: Tensor, timestep: Tensor, own: np.ndarray) -> Tensor:
    """The rows `own` of the model's output, of a rank that has these alone inside the model."""
    size = sample.shape[2]
    h = (model.conv_in(sample) + timestep.view(-1, 1, 1, 1))[:, :, own]
    h = F.silu(F.group_norm(h, model.norm.num_groups, model.norm.weight, model.norm.bias, model.norm.eps))
    half = own[::2] // 2
    strips = [
        F.conv2d(
            F.pad(rows_of(h, own, 2 * row + np.arange(-1, 2), size), (1, 1, 0, 0)),
            model.down.weight,
            model.down.bias,
            2,
        )
        for row in half
    ]
    h = torch.cat(strips, 2)
    tokens = h.flatten(2).transpose(1, 2)
    seen = F.scaled_dot_product_attention(model.query(tokens), model.key(tokens), model.value(tokens))
    h = F.interpolate((tokens + seen).transpose(1, 2).reshape(h.shape), scale_factor=2.0)
    rows = [F.pad(rows_of(h, own, row + np.arange(-1, 2), size), (1, 1, 0, 0)) for row in own]
    return torch.cat([F.conv2d(each, model.conv_out.weight, model.conv_out.bias) for each in rows], 2)


@torch.no_grad()
def test_local_steps_equal_the_reference_and_send_nothing_but_the_output() -> None:
    model: Any = block().double()
    given = [(x.double(), t.double()) for x, t in steps(6)]
    with fxpass.parallelize(model, 2, strategy=LOCAL, executor="lockstep") as module:
        found, before = [], 0
        module.reset([t.item() for _, t in given])
        for k, each in enumerate(given):
            found.append(module(*each)["sample"].clone())
            after = sum(module.traffic.values())
            if k >= 2:
                output = each[0][0, 0, 0].numel() * 4 * 2 * 8 * each[0].shape[2] // 2
                assert after - before == output, k
            before = after
        assert module.plan.state_bytes_per_rank == (0, 0)
        for k, (sample, time) in enumerate(given):
            expected = whole(model, sample, time)
            if k >= 2:
                for own in (np.arange(8), np.arange(8, 16)):
                    expected[:, :, own] = alone(model, sample, time, own)
            torch.testing.assert_close(found[k], expected, rtol=1e-9, atol=1e-9)


def test_a_rank_without_own_rows_has_zeros_in_place_of_those_of_others() -> None:
    have = Rows.of((0, 1)), Rows.of((2, 3)), Rows.of(())
    want = Rows.of((0, 1, 2)), Rows.of((1, 2, 3)), Rows.of((3,))
    fetch = Fetch("halo", (1, 4), torch.float32, 3, dim=1, have=have, want=want, fresh="local")
    values = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), torch.empty(1, 0)
    found = [fetch.local(rank, x).tolist() for rank, x in enumerate(values)]
    assert found == [[[1.0, 2.0, 2.0]], [[3.0, 3.0, 4.0]], [[0.0]]]
