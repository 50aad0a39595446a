"""When gradual pruning chooses its masks, how far it goes, and that counts are exact."""

from fractions import Fraction

import pytest
import torch

from hf_sparse import TrainingError
from hf_sparse.core.patterns import NM, Unstructured
from hf_sparse.training.schedule import Cubic, Partial


def test_the_fraction_is_zhu_and_gupta_s():
    cubic = Cubic(start=10, end=50, frequency=5)
    for step in range(10, 51, 5):
        # Eq. 1 with s_i = 0, s_f = 1, n dt = 40.
        expected = 1 + (0 - 1) * (1 - (step - 10) / 40) ** 3
        assert float(cubic.fraction(step)) == pytest.approx(expected)
    assert cubic.fraction(50) == 1


def test_masks_are_chosen_every_few_steps_behind_the_start_and_at_the_end():
    cubic = Cubic(start=3, end=11, frequency=4)
    assert [step for step in range(20) if cubic.due(step)] == [7, 11]
    uneven = Cubic(start=3, end=12, frequency=4)
    assert [step for step in range(20) if uneven.due(step)] == [7, 11, 12]
    last = [uneven.last_due(step) for step in (0, 2, 3, 6, 7, 11, 12, 19)]
    assert last == [None, None, None, None, 7, 11, 12, 12]


def test_fractions_of_a_run_become_steps():
    assert Cubic.over(200, 0.1, 0.8, 10) == Cubic(20, 160, 10)
    assert Cubic.over(200, 1, 150, 10) == Cubic(1, 150, 10)


@pytest.mark.parametrize(("start", "end"), [(0, 201), (5, 5), (0.5, 0.2), (-1, 10)])
def test_a_span_that_does_not_fit_the_run_is_refused(start, end):
    with pytest.raises(TrainingError, match=f"start={start} and end={end} are steps"):
        Cubic.over(200, start, end, 10)


PATTERNS = [
    (Unstructured(0.6), False),
    (Unstructured(0.6), True),
    (NM(2, 4), False),
    (NM(3, 8), True),
]


@pytest.mark.parametrize(("pattern", "per_row"), PATTERNS, ids=str)
@pytest.mark.parametrize("shape", [(6, 16), (5, 11), (1, 3)], ids=str)
def test_zeros_grow_to_exactly_the_pattern_and_stay_where_they_are(pattern, per_row, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    final_zeros = int((~pattern.mask(weight.abs(), per_row=per_row)).sum())
    gone = torch.zeros(shape, dtype=torch.bool)
    for step in range(1, 6):
        partial = Partial.of(pattern, Fraction(step, 5), gone)
        mask = partial.mask(weight.abs(), per_row=per_row)
        assert bool((gone <= ~mask).all())
        gone = ~mask
        rows = shape[0] if per_row else 1
        assert int(gone.sum()) == rows * (step * (final_zeros // rows) // 5)
        # As training does: all changes, what is gone as well.
        weight = weight + 0.1 * torch.randn(shape)
    assert int(gone.sum()) == final_zeros
    if isinstance(pattern, NM):
        groups = mask[:, : shape[1] // pattern.m * pattern.m].reshape(-1, pattern.m)
        assert bool((groups.sum(dim=1) == pattern.n).all())


def partial_mask(scores, pattern, fraction):
    gone = torch.zeros_like(scores, dtype=torch.bool)
    return Partial.of(pattern, fraction, gone).mask(scores).tolist()


def test_of_the_pattern_s_zeros_the_lowest_scores_go_first():
    scores = torch.tensor([[5.0, 1.0, 3.0, 2.0, 4.0, 6.0]])
    mask = partial_mask(scores, Unstructured(0.5), Fraction(2, 3))
    assert mask == [[True, False, True, False, True, True]]


def test_what_is_gone_stays_gone_though_others_score_as_low():
    gone = torch.tensor([[False, False, False, True]])
    partial = Partial.of(Unstructured(0.5), Fraction(1), gone)
    assert partial.mask(torch.zeros(1, 4)).tolist() == [[False, True, True, False]]


def test_an_n_m_mask_drops_nothing_on_the_way_that_it_would_keep():
    # The lowest of all is 1, but its group of 2 keeps it.
    scores = torch.tensor([[1.0, 0.5, 9.0, 8.0]])
    assert partial_mask(scores, NM(1, 2), Fraction(1, 2)) == [[True, False, True, True]]
    assert partial_mask(scores, NM(1, 2), Fraction(1)) == [[True, False, True, False]]


def test_a_solver_reads_the_sparsity_that_is_reached():
    partial = Partial.of(NM(1, 4), Fraction(1, 3), torch.zeros(2, 8, dtype=torch.bool))
    assert partial.sparsity == pytest.approx(0.25)
    assert partial.zeros(16) == 4
