"""Coding changes in a few bits: sizes and errors, and that errors do not accumulate."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import strategies as st

from fxpass.ir.coding import GROUP, OUTERMOST, decode, encode, encoded_size
from tests.properties import given

counts = st.integers(1, 3 * GROUP)
bits = st.sampled_from(sorted(OUTERMOST))


@given(counts, bits, st.integers(0, 9), st.floats(1e-6, 1e6))
def test_a_decoded_change_is_off_by_less_than_a_level(count: int, bits: int, seed: int, scale: float) -> None:
    change = torch.randn(2, 3, count, generator=torch.Generator().manual_seed(seed)) * scale
    codes = encode(change, bits)
    assert codes.dtype == torch.uint8
    assert codes.shape == (2, 3, encoded_size(count, bits))
    groups = -(-count // GROUP)
    width = -(-count // (groups * (8 // bits))) * (8 // bits)
    off = (decode(codes, count, bits) - change).abs()
    for start in range(0, count, width):
        largest = change[..., start : start + width].abs().amax(-1, keepdim=True)
        level = largest / (2 ** (bits - 1) - 0.5)
        cut = largest * (1 - OUTERMOST[bits])  # numbers beyond the outermost level are cut to it
        assert (off[..., start : start + width] <= torch.maximum(0.51 * level, cut + 0.01 * largest)).all()


@pytest.mark.parametrize("bits", OUTERMOST)
def test_the_largest_number_of_a_group_fits_its_bits_however_its_step_is_rounded(bits: int) -> None:
    """One group for each of 65536 mantissas of float32, among them those where rounding changes the step the most."""
    largest = (torch.arange(0x3F800000, 0x40000000, 128, dtype=torch.int32)).view(torch.float32)[:, None]
    pair = torch.cat([largest, -largest], 1)
    found = decode(encode(pair, bits), 2, bits)
    torch.testing.assert_close(found, pair * OUTERMOST[bits], rtol=0.005, atol=0)


@pytest.mark.parametrize("bits", OUTERMOST)
def test_a_full_group_costs_its_bits_and_two_bytes(bits: int) -> None:
    assert encoded_size(GROUP, bits) == GROUP * bits // 8 + 2
    assert encoded_size(2 * GROUP, bits) == 2 * encoded_size(GROUP, bits)


@given(counts, bits)
def test_a_change_of_zero_decodes_to_zero(count: int, bits: int) -> None:
    assert torch.equal(decode(encode(torch.zeros(2, count), bits), count, bits), torch.zeros(2, count))


@pytest.mark.parametrize("bits", OUTERMOST)
def test_repeated_codes_of_the_remaining_difference_converge_to_the_value(bits: int) -> None:
    value = torch.randn(8, 100, generator=torch.Generator().manual_seed(0))
    known = torch.zeros_like(value)
    off = [value.norm()]
    for _ in range(12):
        known += decode(encode(value - known, bits), 100, bits)
        off.append((value - known).norm())
    assert all(after < 0.6 * before for before, after in pairwise(off) if before > 1e-5)
    assert off[-1] < 1e-2 * off[0]


@pytest.mark.parametrize("count", [20, 21, 130])
def test_codes_of_a_single_vector_decode_although_their_steps_start_at_an_odd_byte(count: int) -> None:
    """Its steps begin at an odd byte."""
    change = torch.linspace(-1, 1, count).unsqueeze(0)
    torch.testing.assert_close(decode(encode(change, 8), count, 8), change, rtol=0, atol=0.01)


def test_a_number_that_is_not_finite_stays_in_its_group() -> None:
    change = torch.ones(1, 2 * GROUP)
    change[0, 3] = torch.nan
    found = decode(encode(change, 4), 2 * GROUP, 4)
    assert found[0, :GROUP].isnan().all()
    torch.testing.assert_close(found[0, GROUP:], change[0, GROUP:], rtol=0.01, atol=0)
