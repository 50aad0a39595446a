"""Scores become masks: exact counts whatever the ties, n:m in every group, clear refusals."""

import itertools
from decimal import Decimal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparse.core.errors import ConfigError
from hf_sparse.core.patterns import NM, Unstructured, keep_highest, parse_pattern

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def kept_by_sorting(scores: list[float], drop: int) -> list[bool]:
    """The `drop` lowest go, of equal ones the earlier first: a stable sort says the same."""
    gone = set(sorted(range(len(scores)), key=lambda i: scores[i])[:drop])
    return [i not in gone for i in range(len(scores))]


@st.composite
def tied_scores(draw) -> list[list[float]]:
    """Small matrices with few distinct values, so that most thresholds are ties."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 19))
    value = st.sampled_from([0.0, 0.25, 1.0, 3.5])
    return draw(
        st.lists(st.lists(value, min_size=columns, max_size=columns), min_size=rows, max_size=rows)
    )


@pytest.mark.parametrize(
    ("sparsity", "n", "zeros"),
    [(0.29, 100, 29), (0.57, 100, 57), (0.7, 10, 7), (0.5, 7, 3), (0.0, 9, 0), (1e-05, 10**6, 10)],
)
def test_zeros_are_counted_with_the_decimal_that_was_written(sparsity, n, zeros):
    assert Unstructured(sparsity).zeros(n) == zeros


@SETTINGS
@given(st.decimals(0, Decimal("0.9999"), places=4), st.integers(0, 5000))
def test_zeros_are_the_floor_of_the_decimal_product(sparsity, n):
    assert Unstructured(float(sparsity)).zeros(n) == int(sparsity * n)


@SETTINGS
@given(tied_scores(), st.integers(0, 99))
def test_whole_matrix_mask_drops_the_lowest_scores_and_counts_ties_exactly(scores, percent):
    mask = Unstructured(percent / 100).mask(torch.tensor(scores))
    flat = [score for row in scores for score in row]
    assert mask.flatten().tolist() == kept_by_sorting(flat, percent * len(flat) // 100)


@SETTINGS
@given(tied_scores(), st.integers(0, 99))
def test_per_row_mask_drops_the_same_number_from_each_row(scores, percent):
    mask = Unstructured(percent / 100).mask(torch.tensor(scores), per_row=True)
    expected = [kept_by_sorting(row, percent * len(row) // 100) for row in scores]
    assert mask.tolist() == expected


@SETTINGS
@given(tied_scores(), st.sampled_from([(1, 2), (2, 4), (4, 8), (1, 4), (3, 5), (7, 16)]))
def test_n_of_m_mask_keeps_n_in_each_group_and_the_ceiling_in_a_tail(scores, pattern):
    n, m = pattern
    mask = NM(n, m).mask(torch.tensor(scores)).tolist()
    for row, kept in zip(scores, mask, strict=True):
        expected = []
        for start in range(0, len(row), m):
            group = row[start : start + m]
            keep = -(-n * len(group) // m)
            expected += kept_by_sorting(group, len(group) - keep)
        assert kept == expected


def test_n_of_m_mask_is_the_same_with_and_without_per_row():
    scores = torch.rand(5, 11, generator=torch.Generator().manual_seed(0))
    assert torch.equal(NM(2, 4).mask(scores), NM(2, 4).mask(scores, per_row=True))


@pytest.mark.parametrize(
    ("n", "m", "width", "kept"), [(2, 4, 4, 2), (2, 4, 1, 1), (2, 4, 3, 2), (1, 4, 3, 1)]
)
def test_a_tail_keeps_the_ceiling_of_its_share(n, m, width, kept):
    assert NM(n, m).kept(width) == kept


def test_column_zeros_add_up_to_the_zeros_of_the_whole_matrix():
    pattern, rows, edges = Unstructured(0.37), 7, [0, 3, 4, 10, 23]
    parts = [pattern.column_zeros(rows, a, b) for a, b in itertools.pairwise(edges)]
    assert sum(parts) == 59  # floor(0.37 * 161)
    assert parts[0] == 7  # floor(0.37 * 21)


def test_keep_highest_keeps_everything_if_nothing_is_dropped():
    assert keep_highest(torch.zeros(2, 3), 0).tolist() == [[True] * 3] * 2


def test_masks_leave_the_scores_as_they_were():
    scores = torch.rand(4, 10, generator=torch.Generator().manual_seed(0))
    before = scores.clone()
    Unstructured(0.5).mask(scores)
    NM(2, 4).mask(scores)
    assert torch.equal(scores, before)


def test_pattern_text_is_parsed_and_printed_back():
    assert parse_pattern("unstructured", 0.3) == Unstructured(0.3)
    assert parse_pattern("2:4", 0.5) == NM(2, 4)
    assert str(parse_pattern("14:16", 0.5)) == "14:16"
    assert str(parse_pattern("unstructured", 0.5)) == "unstructured"


@pytest.mark.parametrize(("n", "m", "sparsity"), [(2, 4, 0.5), (1, 4, 0.75), (1, 3, 2 / 3)])
def test_n_of_m_implies_its_sparsity(n, m, sparsity):
    assert NM(n, m).sparsity == pytest.approx(sparsity, abs=1e-15)


@pytest.mark.parametrize("text", ["2/4", "2:4:8", "", "-1:4", "2:4 ", "dense", None, 4, "2.0:4"])
def test_an_unknown_pattern_is_refused_with_what_is_allowed(text):
    with pytest.raises(ConfigError, match=r"'unstructured' or 'n:m'") as caught:
        parse_pattern(text, 0.5)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["0:4", "4:4", "0:0"])
def test_a_pattern_that_keeps_nothing_or_everything_is_refused(text):
    with pytest.raises(ConfigError, match="1 <= n < m"):
        parse_pattern(text, 0.5)


def test_swapped_numbers_are_refused_with_the_likely_meaning():
    with pytest.raises(ConfigError, match="did you mean '2:4'"):
        parse_pattern("4:2", 0.5)
