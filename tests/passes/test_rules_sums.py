"""Norms, reductions, products against law 1: cut where the rule promises it, anywhere, and where ranks overlap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.passes.examples import Example, randn, split_anywhere, split_where_promised
from tests.passes.harness import cut, evenly, split
from tests.properties import examples, few, given

# -- norms -----------------------------------------------------------------------------------------------------------


def norms() -> dict[str, tuple[nn.Module, tuple[int, ...], tuple[int, ...]]]:  # module, shape, promised dims
    cases: dict[str, tuple[nn.Module, tuple[int, ...], tuple[int, ...]]] = {
        "group": (nn.GroupNorm(2, 4), (2, 4, 6, 5), (0, 2, 3)),
        "group of tokens": (nn.GroupNorm(4, 4), (2, 4, 9), (0, 2)),
        "group without weights": (nn.GroupNorm(1, 4, affine=False), (2, 4, 3, 5, 2), (0, 2, 3, 4)),
        "layer": (nn.LayerNorm(6), (2, 7, 6), (0, 1, 2)),
        "layer of two dims": (nn.LayerNorm([7, 6]), (2, 7, 6), (0, 1, 2)),
        "layer without weights": (nn.LayerNorm(6, elementwise_affine=False), (2, 7, 6), (0, 1, 2)),
        "layer without bias": (nn.LayerNorm(6, bias=False), (2, 7, 6), (0, 1, 2)),
        "rms": (nn.RMSNorm(6), (2, 7, 6), (0, 1)),
        "batch": (nn.BatchNorm2d(4), (2, 4, 6, 5), (0, 2, 3)),
        "batch of one dim": (nn.BatchNorm1d(4), (2, 4, 9), (0, 2)),
        "batch of its own statistics": (nn.BatchNorm3d(4, track_running_stats=False), (2, 4, 5, 3, 4), (0, 2, 3, 4)),
        "instance of known statistics": (nn.InstanceNorm1d(4, track_running_stats=True), (2, 4, 9), (0, 2)),
        "instance": (nn.InstanceNorm2d(4, affine=True), (2, 4, 6, 5), (0, 2, 3)),
    }
    for module, _, _ in cases.values():
        for parameter in module.parameters():
            nn.init.normal_(parameter)
    return cases


@pytest.mark.parametrize("name", norms())
@few
@given(data=st.data())
def test_norms_are_split(name: str, data: st.DataObject) -> None:
    module, shape, dims = norms()[name]
    split_where_promised(data, Example(module.double(), [randn(*shape)], {0: dims}))


@pytest.mark.parametrize("name", norms())
@few
@given(data=st.data())
def test_norms_are_right_on_any_cut(name: str, data: st.DataObject) -> None:
    module, shape, _ = norms()[name]
    split_anywhere(data, Example(module.double(), [randn(*shape)]))


@few
@given(st.data())
def test_the_weights_of_norms_may_be_split(data: st.DataObject) -> None:
    split_anywhere(data, Example(lambda x, w, b: F.group_norm(x, 2, w, b), [randn(2, 4, 6), randn(4), randn(4)]))
    split_anywhere(data, Example(lambda x, w, b: F.layer_norm(x, (6,), w, b), [randn(2, 4, 6), randn(6), randn(6)]))
    split_anywhere(data, Example(lambda x, w: F.rms_norm(x, (6,), w), [randn(2, 4, 6), randn(6)]))
    moments = [randn(4), randn(4).abs()]
    split_anywhere(
        data, Example(lambda x, m, w: F.batch_norm(x, m, moments[1], w), [randn(2, 4, 6), randn(4), randn(4)])
    )


def test_a_norm_over_the_split_dim_exchanges_its_moments_only() -> None:
    result = split(nn.GroupNorm(2, 4).double(), [randn(2, 4, 6, 5)], {0: cut(2, (0, 1), (1, 6))}, 2)
    assert result.roles == {"moments": 1, "output": 1}
    assert next(e for e in result.exchanges if e.role == "moments").received(0) == 2 * 2 * 2 * 8


# -- reductions ------------------------------------------------------------------------------------------------------


REDUCTIONS: dict[str, Any] = {
    "sum": lambda x, dims, keep: x.sum(dims, keepdim=keep),
    "mean": lambda x, dims, keep: x.mean(dims, keepdim=keep),
    "amax": lambda x, dims, keep: x.amax(dims, keepdim=keep),
    "amin": lambda x, dims, keep: x.amin(dims, keepdim=keep),
    "var": lambda x, dims, keep: x.var(dims, keepdim=keep),
    "biased var": lambda x, dims, keep: x.var(dims, correction=0, keepdim=keep),
    "var_mean": lambda x, dims, keep: torch.var_mean(x, dims, keepdim=keep),
    "std": lambda x, dims, keep: x.std(dims, keepdim=keep),
    "norm": lambda x, dims, keep: torch.linalg.vector_norm(x, dim=dims, keepdim=keep),
    "sum of integers": lambda x, dims, keep: (x > 0).sum(dims, keepdim=keep),
    "sum in another dtype": lambda x, dims, keep: x.float().sum(dims, keepdim=keep, dtype=torch.float64),
}


@pytest.mark.parametrize("name", REDUCTIONS)
@examples(15)
@given(data=st.data(), keep=st.booleans())
def test_reductions_are_split(name: str, data: st.DataObject, keep: bool) -> None:
    dims = data.draw(st.sampled_from([(0,), (1,), (2,), (0, 2), (1, 2), (-1, -2), (0, 1, 2)]), label="dims")
    split_where_promised(data, Example(lambda x: REDUCTIONS[name](x, dims, keep), [randn(3, 5, 6)], {0: (0, 1, 2)}))


@few
@given(st.data())
def test_reductions_of_everything_are_split(data: st.DataObject) -> None:
    function = lambda x: (x.sum(), x.mean(), x.amax(), x.amin(), x.max(), x.min(), x.var(), x.std())  # noqa: E731
    split_where_promised(data, Example(function, [randn(3, 5, 6)], {0: (0, 1, 2)}))


def test_the_variance_of_complex_numbers_is_right() -> None:
    found = split(lambda x: torch.view_as_complex(x).var(1), [randn(3, 8, 2)], {0: evenly(1, 8, 2)}, 2, exact=False)
    (reason,) = found.fallbacks
    assert "complex" in reason


def test_a_product_with_negative_zero_is_another_value() -> None:
    def function(x: Tensor) -> Tensor:
        x = x.abs() + 1
        return (x * 0.0).reciprocal().sign() * 2 + (x * -0.0).reciprocal().sign()

    split(function, [randn(2, 8, 4)], {0: evenly(1, 8, 2)}, 2)


def test_a_mean_in_half_precision_does_not_overflow() -> None:
    def function(x: Tensor) -> Tensor:
        return (x * 0 + 3e4).to(torch.float16).mean((1, 2)).double()

    split(function, [randn(2, 8, 4)], {0: evenly(1, 8, 2)}, 2)


ALONG: dict[str, Any] = {
    "softmax": lambda x, dim: x.softmax(dim),
    "log_softmax": lambda x, dim: x.log_softmax(dim),
    "cumsum": lambda x, dim: x.cumsum(dim),
    "cumprod": lambda x, dim: x.cumprod(dim),
    "glu": F.glu,
    "sort": lambda x, dim: list(x.sort(dim)),
    "topk": lambda x, dim: list(x.topk(3, dim)),
    "topk smallest": lambda x, dim: x.topk(2, dim, largest=False).values,
}


@pytest.mark.parametrize("name", ALONG)
@pytest.mark.parametrize("dim", [1, -1])
@few
@given(data=st.data())
def test_operators_along_one_dim_are_split_along_the_others(name: str, dim: int, data: st.DataObject) -> None:
    example = Example(lambda x: ALONG[name](x, dim), [randn(3, 4, 6)], {0: [d for d in range(3) if d != dim % 3]})
    split_where_promised(data, example)


@pytest.mark.parametrize("name", ALONG)
@few
@given(data=st.data())
def test_operators_along_one_dim_are_right_on_any_cut(name: str, data: st.DataObject) -> None:
    split_anywhere(data, Example(lambda x: ALONG[name](x, 1), [randn(3, 4, 6)]))


# -- products --------------------------------------------------------------------------------------------------------

PRODUCTS: dict[str, tuple[Any, list[tuple[int, ...]], dict[int, Any]]] = {
    "linear": (F.linear, [(2, 5, 6), (4, 6), (4,)], {0: (0, 1, 2)}),
    "linear without bias": (F.linear, [(5, 6), (4, 6)], {0: (0, 1)}),
    "linear of a vector": (F.linear, [(6,), (4, 6), (4,)], {0: (0,)}),
    "linear to a number": (F.linear, [(3, 5, 6), (6,)], {0: (0, 1, 2)}),
    "mm": (torch.mm, [(4, 5), (5, 6)], {0: (0, 1), 1: (0, 1)}),
    "bmm": (torch.bmm, [(3, 4, 5), (3, 5, 6)], {0: (0, 1, 2), 1: (0, 1, 2)}),
    "matmul": (torch.matmul, [(2, 3, 4, 5), (2, 3, 5, 6)], {0: (0, 1, 2, 3), 1: (0, 1, 2, 3)}),
    "matmul that broadcasts": (torch.matmul, [(2, 1, 4, 5), (3, 5, 6)], {0: (0, 2, 3), 1: (0, 1, 2)}),
    "matmul by a matrix": (torch.matmul, [(2, 3, 4, 5), (5, 6)], {0: (0, 1, 2, 3), 1: (0, 1)}),
    "matmul by a vector": (torch.matmul, [(2, 4, 5), (5,)], {}),
    "addmm": (torch.addmm, [(6,), (4, 5), (5, 6)], {0: (0,), 1: (0, 1), 2: (0, 1)}),
    "addmm scaled": (lambda a, x, y: torch.addmm(a, x, y, beta=0.5, alpha=2), [(4, 6), (4, 5), (5, 6)],
                     {0: (0, 1), 1: (0, 1), 2: (0, 1)}),
    "addmm that adds nothing": (lambda a, x, y: torch.addmm(a, x, y, beta=0), [(4, 6), (4, 5), (5, 6)],
                                {0: (0, 1), 1: (0, 1), 2: (0, 1)}),
    "product of whole numbers": (lambda x, y: torch._int_mm(*((9 * z).to(torch.int8) for z in (x, y))),
                                 [(32, 16), (16, 8)], {0: (0, 1), 1: (0, 1)}),
    "product with packed weights": (
        lambda x, y, z: torch._weight_int8pack_mm(x.bfloat16(), (9 * y).to(torch.int8), z.bfloat16()),
        [(5, 16), (16, 16), (16,)], {0: (0,)},
    ),
    "cdist": (torch.cdist, [(2, 7, 5), (6, 5)], {0: (0, 1), 1: (0,)}),
    "cdist of many": (torch.cdist, [(2, 28, 5), (2, 6, 5)], {0: (0, 1), 1: (0, 1)}),
    "cdist of another norm": (lambda x, y: torch.cdist(x, y, p=1), [(28, 5), (6, 5)], {0: (0,), 1: (0,)}),
    "baddbmm": (torch.baddbmm, [(3, 1, 6), (3, 4, 5), (3, 5, 6)], {0: (0, 2), 1: (0, 1, 2), 2: (0, 1, 2)}),
    "einsum": (
        lambda x, y: torch.einsum("bhid,bhjd->bhij", x, y), [(2, 3, 4, 5), (2, 3, 6, 5)], {0: range(4), 1: range(4)}
    ),
    "einsum of three": (lambda x, y, z: torch.einsum("ab,bc,cd->ad", x, y, z), [(3, 4), (4, 5), (5, 3)],
                        {0: (0, 1), 1: (0, 1), 2: (0, 1)}),
    "einsum that sums": (lambda x: torch.einsum("abc->b", x), [(3, 4, 5)], {0: (0, 1, 2)}),
    "einsum that permutes": (lambda x: torch.einsum("nhwpqc->nchpwq", x), [(2, 4, 3, 2, 2, 3)], {0: range(6)}),
    "einsum that broadcasts": (lambda x, y: torch.einsum("bi,bj->bij", x, y), [(1, 4), (3, 5)], {0: (1,), 1: (0, 1)}),
    "einsum without letters": (lambda x, y: torch.einsum("...i,ij->...j", x, y), [(2, 3, 4), (4, 5)],
                               {0: (0, 1, 2), 1: (0, 1)}),
    "einsum without a result": (lambda x, y: torch.einsum("jb...,bi", x, y), [(3, 4, 5, 2), (4, 6)],
                                {0: range(4), 1: (0, 1)}),
    "einsum whose dots broadcast": (lambda x, y: torch.einsum("a...c,...b->...ab", x, y), [(4, 3, 5, 2), (5, 6)],
                                    {0: range(4), 1: (0, 1)}),
    "einsum of a diagonal": (lambda x: torch.einsum("iij->ij", x), [(4, 4, 5)], {}),
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name, case in PRODUCTS.items() if case[2]])
@examples(12)
@given(data=st.data())
def test_products_are_split_along_every_dim_of_every_operand(name: str, data: st.DataObject) -> None:
    function, shapes, promised = PRODUCTS[name]
    split_where_promised(data, Example(function, [randn(*s) for s in shapes], promised))


@pytest.mark.parametrize("name", PRODUCTS)
@few
@given(data=st.data())
def test_products_are_right_on_any_cut(name: str, data: st.DataObject) -> None:
    function, shapes, _ = PRODUCTS[name]
    split_anywhere(data, Example(function, [randn(*s) for s in shapes]))


def test_linear_attention_adds_partial_sums_and_gathers_no_token() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q @ (k.transpose(-1, -2) @ v)

    x = [randn(2, 8, 3) for _ in range(3)]
    result = split(function, x, {i: evenly(1, 8, 2) for i in range(3)}, 2)
    assert result.roles == {"sum": 1, "output": 1}


# -- where ranks overlap ---------------------------------------------------------------------------------------------


def test_a_dim_that_shrinks_to_one_row_on_every_rank_is_whole() -> None:
    overlapping = cut(2, (0, 3), (1, 4))
    conv = nn.Conv2d(2, 3, (3, 1), stride=(4, 1)).double()  # both ranks hold the centre of the only window
    split(lambda x, y: conv(x) + y, [randn(1, 2, 4, 5), randn(1, 3, 6, 5)], {0: overlapping}, 2)
    split(lambda x, y: conv(x) * y + x[:, :1], [randn(1, 2, 4, 5), randn(1, 1, 4, 5)], {0: overlapping}, 2)


def test_a_cat_that_has_all_rows_on_every_rank_becomes_whole() -> None:
    everywhere = {0: cut(1, (0, 4), (2, 4)), 1: cut(1, (0, 3), (0, 3))}
    result = split(lambda x, y: torch.cat([x, y], 1).flatten(1), [randn(2, 4, 3), randn(2, 3, 3)], everywhere, 2)
    assert result.roles["fallback"] == 0


NOTHING_OF_ITS_OWN = cut(1, (0, 5), (2, 4), (0, 5))  # what ranks 1 and 2 hold, rank 0 holds too


@pytest.mark.parametrize("name", REDUCTIONS)
def test_a_row_that_several_ranks_hold_counts_once_in_a_reduction(name: str) -> None:
    split(lambda x: REDUCTIONS[name](x, (1,), False), [randn(3, 5, 6)], {0: NOTHING_OF_ITS_OWN}, 3)


def test_a_row_that_several_ranks_hold_counts_once_in_statistics_and_products() -> None:
    x = randn(3, 5, 6)
    split(nn.LayerNorm([5, 6]).double(), [x], {0: NOTHING_OF_ITS_OWN}, 3)
    split(lambda x: F.group_norm(x.transpose(1, 2), 2), [x], {0: NOTHING_OF_ITS_OWN}, 3)
    split(lambda x: x.transpose(1, 2) @ x, [x], {0: NOTHING_OF_ITS_OWN}, 3)
