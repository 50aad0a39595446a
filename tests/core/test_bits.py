"""Bit strings: lowest bit first, whole bytes a row, zero padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparse.core.bits import (
    count_ones,
    nonzero_bits,
    pack_numbers,
    padding_is_zero,
    unpack_bits,
    unpack_numbers,
)


@st.composite
def bit_rows(draw) -> list[list[bool]]:
    rows, n = draw(st.integers(1, 4)), draw(st.integers(1, 33))
    row = st.lists(st.booleans(), min_size=n, max_size=n)
    return draw(st.lists(row, min_size=rows, max_size=rows))


def bytes_by_hand(row: list[bool]) -> list[int]:
    """Bit i of the row is bit i % 8 of byte i // 8."""
    packed = [0] * -(-len(row) // 8)
    for i, bit in enumerate(row):
        packed[i // 8] |= int(bit) << i % 8
    return packed


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(bit_rows())
def test_bits_are_packed_lowest_first_and_unpacked_again(rows):
    bits = torch.tensor(rows)
    packed = nonzero_bits(bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [bytes_by_hand(row) for row in rows]
    assert torch.equal(unpack_bits(packed, bits.shape[1]), bits)
    assert padding_is_zero(packed, bits.shape[1])


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(bit_rows())
def test_ones_are_counted_in_the_packed_bits(rows):
    assert count_ones(torch.tensor([bytes_by_hand(row) for row in rows], dtype=torch.uint8)) == sum(
        map(sum, rows)
    )


def test_unpacking_reads_only_the_bits_asked_for():
    assert unpack_bits(torch.tensor([[0b11110001]], dtype=torch.uint8), 3).tolist() == [
        [True, False, False]
    ]


@pytest.mark.parametrize("bit", [3, 7])
def test_a_bit_set_behind_the_last_one_is_noticed_in_any_row(bit):
    packed = torch.zeros(3, 2, dtype=torch.uint8)
    packed[1, 1] = 1 << bit
    assert not padding_is_zero(packed, 11)
    assert padding_is_zero(packed, 16)


def test_the_last_bit_before_the_padding_is_no_padding():
    packed = torch.tensor([[0, 0b100]], dtype=torch.uint8)
    assert padding_is_zero(packed, 11)
    assert not padding_is_zero(packed, 10)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.sampled_from([8, 4, 3]), st.lists(st.integers(0, 255), max_size=40))
def test_numbers_follow_each_other_without_gaps_lowest_bit_first(bits, values):
    values = [value % 2**bits for value in values]
    packed = pack_numbers(torch.tensor(values, dtype=torch.uint8), bits)
    whole = sum(value << bits * i for i, value in enumerate(values))
    assert packed.tolist() == list(whole.to_bytes(-(-len(values) * bits // 8), "little"))
    unpacked = unpack_numbers(packed, bits).tolist()
    assert unpacked[: len(values)] == values
    assert len(unpacked) == packed.numel() * 8 // bits
    assert not any(unpacked[len(values) :])
