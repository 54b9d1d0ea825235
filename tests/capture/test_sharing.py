"""Results that share memory in the model do so where it is split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpass
from fxpass.capture.sharing import shared_among, sharing


def _complex(y: Tensor, result: Callable[[Tensor], Any]) -> Any:
    return result(torch.complex(y[:, :2], y[:, 2:]))


RETURNS: dict[str, Callable[[Tensor], Any]] = {
    "a part": lambda y: (y, y[:, :2]),
    "itself": lambda y: (y, y),
    "detached": lambda y: (y.detach(), y),
    "rows": lambda y: (y[:, 1:2, 2:9:3], y),
    "another order": lambda y: {"view": y.permute(0, 2, 3, 1), "all": y},
    "a view of a view": lambda y: [y.transpose(1, 3)[:, 1:], y.transpose(1, 3), y[..., 2]],
    "expanded": lambda y: (y, y[:, :1].expand(-1, 4, -1, -1)),
    "expanded before": lambda y: (y[:, :1].expand(-1, 4, -1, -1), y),
    "expanded beyond": lambda y: (y, y[:, :1].expand(-1, 9, -1, -1)),
    "parts beside each other": lambda y: (y[:, :2], y[:, 2:]),
    "a copy": lambda y: (y, y[:, :2].clone()),
    "written to": lambda y: (y, y[:, :2].mul_(2)),
    "overlapping parts": lambda y: (y[:, :3], y[:, 1:]),
    "overlapping parts and a part": lambda y: (y[:, 1:3], y[..., 1:], y[..., :5], y[:, :1]),
    "overlapping through a third": lambda y: (y[0, 0, :4], y[0, 0, 6:], y[0, 0, 2:8].t()),
    "parts of another row": lambda y: (y[..., ::2], y[..., 1::2], y[..., 1]),
    "windows": lambda y: (y.unfold(3, 4, 2)[0], y[1], y[0]),
    "parts of windows": lambda y: (y.unfold(3, 4, 2)[..., 1:], y[..., :3]),
    "expanded parts": lambda y: (y[:, :1].expand(-1, 4, -1, -1), y[:, :2, 1:]),
    "real and imaginary": lambda y: _complex(y, lambda z: (z.real, z.imag, z)),
    "of one complex number": lambda y: _complex(y, lambda z: (torch.view_as_real(z)[:, 1:], z.imag)),
    "conjugates": lambda y: _complex(y, lambda z: (z[:, :1].conj(), z, z.conj().imag)),
    "a contiguous copy": lambda y: (y, y.transpose(1, 3).contiguous(), y.contiguous()),
}


class Model(nn.Module):
    def __init__(self, result: Callable[[Tensor], Any], channels_last: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.result = result
        self.channels_last = channels_last

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return self.result(y.contiguous(memory_format=torch.channels_last) if self.channels_last else y)


def after_writes(results: Any) -> list[list[Tensor]]:
    """Results, and how they change when each is written to in turn."""
    leaves = list(results.values()) if isinstance(results, dict) else list(results)
    found = [[leaf.clone() for leaf in leaves]]
    for i, leaf in enumerate(leaves):
        if 0 not in leaf.stride():
            leaf.mul_(i + 3)
        found.append([each.clone() for each in leaves])
    return found


@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels last"])
@pytest.mark.parametrize("name", RETURNS)
@torch.no_grad()
def test_a_write_to_one_result_changes_the_others_as_in_the_model(name: str, channels_last: bool) -> None:
    torch.manual_seed(0)
    model, x = Model(RETURNS[name], channels_last).eval(), torch.randn(2, 3, 16, 8)
    parallel: Any = fxpass.parallelize(model, world_size=2, executor="lockstep")
    with parallel as split:
        for _ in range(2):
            for found, expected in zip(after_writes(split(x)), after_writes(model(x)), strict=True):
                torch.testing.assert_close(found, expected)


class Leaves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor, cache: list[Any]) -> Tensor:
        y = self.conv(x)
        cache[0] = y[:, :2]
        return y


@torch.no_grad()
def test_what_a_call_leaves_in_its_arguments_shares_memory_with_its_result() -> None:
    model, x = Leaves().eval(), torch.randn(2, 3, 16, 8)
    parallel: Any = fxpass.parallelize(model, world_size=2, executor="lockstep")
    with parallel as split:
        for run in (model, split):
            cache: list[Any] = [None]
            y = run(x, cache)
            before = cache[0].clone()
            y.mul_(3)
            assert torch.equal(cache[0], 3 * before)


def test_results_in_another_layout_are_laid_out_as_in_the_model() -> None:
    base = torch.randn(2, 4, 6, 5)
    shared = shared_among([base[:, 1:3], base])
    part, whole = sharing(shared, [base[:, 1:3].clone(), base.to(memory_format=torch.channels_last)])
    assert whole.is_contiguous()
    assert torch.equal(whole, base)
    whole.mul_(2)
    assert torch.equal(part, 2 * base[:, 1:3])


def test_results_of_several_dtypes_share_memory() -> None:
    base = torch.arange(12, dtype=torch.int16)
    results = [base.view(torch.int32)[1:4], base[3:9], base[5:].view(torch.uint8)[1:]]
    (piece,) = shared_among(results)
    numbers, part, parts = sharing([piece], [each.clone() for each in results])
    for found, expected in zip((numbers, part, parts), results, strict=True):
        assert torch.equal(found, expected)
    for one, other in ((numbers, results[0]), (part, results[1]), (parts, results[2])):
        one += 5
        other += 5
        for found, expected in zip((numbers, part, parts), results, strict=True):
            assert torch.equal(found, expected)


def test_results_without_memory_in_common_stay_apart() -> None:
    base = torch.randn(2, 6, 4)
    assert not shared_among([base[:, :2], base[:, 2:], torch.empty(0), base.clone()])
    assert not shared_among([base[..., ::2], base[..., 1::2]])
    assert shared_among([base[..., ::2], base[..., 2]])
