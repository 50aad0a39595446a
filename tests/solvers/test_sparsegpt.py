"""`sparsegpt` against an oracle: the published algorithm, column by column, in double precision.

The oracle shares no code with the package. It eliminates one column after the other over the full
width (no blocks of updates, no strips) and takes U from the inverse itself.
"""

import math
from fractions import Fraction

import pytest
import torch
from layer_oracle import Expected, damped, freeze, hessian_of, make_inputs, make_weight, parsed
from sparsegpt_loop import sparsegpt_loop

from hf_sparse.core.errors import SolveError
from hf_sparse.core.patterns import NM, Unstructured
from hf_sparse.core.statistics import Needs, Statistics
from hf_sparse.solvers.sparsegpt import SparseGPT

SHAPES = [(1, 1), (5, 17), (9, 64), (3, 128), (6, 150), (4, 300)]
# Unstructured sparsities as decimals, or n kept of m.
PATTERNS = ["0.5", "0.29", "0.83", (2, 4), (4, 8), (1, 4), (3, 5)]


class Oracle:
    """SparseGPT (Frantar & Alistarh 2023, algorithm 1) on a given Hessian."""

    def __init__(self, weight: torch.Tensor, hessian: torch.Tensor, damp: float = 0.01) -> None:
        self.weight = weight.double().clone()
        self.mask = torch.ones_like(weight, dtype=torch.bool)
        self.margin = math.inf
        self.dead = [j for j in range(len(hessian)) if hessian[j, j] == 0]
        self.upper = torch.linalg.cholesky(torch.linalg.inv(damped(hessian, damp))).T

    def run(self, pattern: str | tuple[int, int], block: int = 128) -> Expected:
        rows, columns = self.weight.shape
        for i in range(columns):
            if isinstance(pattern, str) and i % block == 0:
                end = min(i + block, columns)
                share = Fraction(pattern) * rows
                self.choose(range(rows), i, end, math.floor(share * end) - math.floor(share * i))
            elif not isinstance(pattern, str) and i % pattern[1] == 0:
                end = min(i + pattern[1], columns)
                drop = (end - i) - math.ceil(Fraction(pattern[0] * (end - i), pattern[1]))
                for row in range(rows):
                    self.choose([row], i, end, drop)
            self.eliminate(i)
        return Expected(self.weight * self.mask, self.mask, self.margin)

    def choose(self, rows, start: int, end: int, drop: int) -> None:
        """Mark the `drop` lowest of some rows' columns start..end."""
        scores = {
            (row, j): 0.0
            if j in self.dead
            else float(self.weight[row, j] ** 2 / self.upper[j, j] ** 2)
            for row in rows
            for j in range(start, end)
        }
        order = sorted(scores, key=scores.__getitem__)
        for place in order[:drop]:
            self.mask[place] = False
        if 0 < drop < len(order) and (stays := scores[order[drop]]) > 0:
            self.margin = min(self.margin, 1 - scores[order[drop - 1]] / stays)

    def eliminate(self, i: int) -> None:
        """Zero what column i loses; the columns to its right make up for it."""
        column = self.weight[:, i].clone()
        error = (column - column * self.mask[:, i]) / self.upper[i, i]
        for j in range(i, self.weight.shape[1]):
            self.weight[:, j] -= error * self.upper[i, j]


def assert_solves(solver: SparseGPT, weight, hessian, pattern, expected: Expected) -> None:
    # A near tie could fall either way in single precision, and would say nothing.
    assert expected.margin > 1e-4, "undecidable case: take another seed"
    solution = solver.solve(weight, freeze(hessian), parsed(pattern))
    assert torch.equal(solution.mask, expected.mask)
    scale = float(expected.weight.abs().max())
    torch.testing.assert_close(
        solution.weight.double(), expected.weight, rtol=1e-4, atol=1e-5 * scale
    )


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masks_and_weights_are_those_of_the_published_algorithm(shape, pattern):
    weight, inputs = make_weight(*shape), make_inputs(shape[1])
    hessian = hessian_of(inputs)
    expected = Oracle(weight, hessian.float()).run(pattern)
    assert_solves(SparseGPT(), weight, hessian, pattern, expected)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("shape", [(5, 19), (4, 150)], ids=str)
def test_dead_inputs_lose_their_weights_first_and_what_stays_keeps_its_value(shape, pattern):
    dead = (1, 3, 4, 5, 6, 13)
    weight, inputs = make_weight(*shape), make_inputs(shape[1], dead)
    hessian = hessian_of(inputs)
    expected = Oracle(weight, hessian.float()).run(pattern)
    assert_solves(SparseGPT(), weight, hessian, pattern, expected)
    solution = SparseGPT().solve(weight, freeze(hessian), parsed(pattern))
    for j in dead:
        kept = solution.mask[:, j]
        torch.testing.assert_close(solution.weight[kept, j], weight[kept, j], rtol=1e-6, atol=0)


def test_all_weights_of_dead_inputs_go_while_there_is_room():
    weight, inputs = make_weight(6, 40), make_inputs(40, dead=(0, 9, 39))
    solution = SparseGPT().solve(100 * weight, freeze(inputs.T @ inputs), Unstructured(0.3))
    assert not solution.mask[:, [0, 9, 39]].any()


@pytest.mark.parametrize("block", [1, 7, 32, 50, 1000])
@pytest.mark.parametrize("pattern", ["0.5", (2, 4), (3, 5)], ids=str)
def test_the_block_size_sets_how_far_a_threshold_reaches_and_leaves_n_of_m_alone(pattern, block):
    weight, inputs = make_weight(5, 117, seed=1), make_inputs(117)
    hessian = hessian_of(inputs)
    expected = Oracle(weight, hessian.float()).run(pattern, block)
    assert_solves(SparseGPT(block_size=block), weight, hessian, pattern, expected)


def test_the_hessian_s_scale_does_not_matter():
    # The published code runs H <- H k/(k+1) + 2/(k+1) x'x over sequences; ours divides by tokens.
    sequences = make_inputs(70).split(15)
    hessian = torch.zeros(70, 70, dtype=torch.float64)
    for k, x in enumerate(sequences):
        hessian = hessian * (k / (k + 1)) + 2 / (k + 1) * x.T @ x
    inputs = torch.cat(sequences)
    weight = make_weight(6, 70)
    expected = Oracle(weight, hessian).run("0.5")
    assert_solves(SparseGPT(), weight, hessian_of(inputs), "0.5", expected)


def test_the_damping_is_the_one_asked_for():
    weight, inputs = make_weight(6, 48), make_inputs(48)
    hessian = hessian_of(inputs)
    expected = Oracle(weight, hessian.float(), damp=0.7).run("0.5")
    assert_solves(SparseGPT(damping=0.7), weight, hessian, "0.5", expected)
    weak = SparseGPT().solve(weight, freeze(hessian), Unstructured(0.5))
    assert not torch.allclose(weak.weight.double(), expected.weight, rtol=1e-2)


@pytest.mark.parametrize("sparsity", [0.29, 0.5, 0.83])
@pytest.mark.parametrize("shape", [(7, 300), (3, 129)], ids=str)
def test_each_128_columns_take_their_share_of_the_zeros_so_that_the_total_is_exact(shape, sparsity):
    weight, inputs = make_weight(*shape), make_inputs(shape[1])
    mask = SparseGPT().solve(weight, freeze(inputs.T @ inputs), Unstructured(sparsity)).mask
    percent = round(100 * sparsity)
    for end in [*range(128, shape[1], 128), shape[1]]:
        assert int((~mask[:, :end]).sum()) == percent * shape[0] * end // 100


def test_the_update_lowers_the_output_error_that_the_mask_alone_makes():
    weight, inputs = make_weight(16, 96), make_inputs(96).float()
    solution = SparseGPT().solve(weight, freeze(inputs.T @ inputs), Unstructured(0.5))
    masked = (inputs @ (weight - weight * solution.mask).T).norm()
    updated = (inputs @ (weight - solution.weight).T).norm()
    assert updated < 0.95 * masked


def indefinite(columns: int, lowest: float) -> torch.Tensor:
    """A symmetric matrix with mean diagonal 1 and one eigenvalue `lowest` < 0."""
    generator = torch.Generator().manual_seed(columns)
    basis = torch.linalg.qr(
        torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    ).Q
    values = torch.linspace(0.5, 1.5, columns, dtype=torch.float64)
    values[0] = lowest
    values *= columns / values.sum()
    return basis @ torch.diag(values) @ basis.T


@pytest.mark.parametrize(("lowest", "damping"), [(-0.05, 0.1), (-0.5, 1.0), (-3.0, 10.0)])
def test_an_indefinite_hessian_is_damped_tenfold_until_it_works_and_the_notes_say_so(
    lowest, damping
):
    weight, hessian = make_weight(5, 24), indefinite(24, lowest)
    expected = Oracle(weight, hessian.float(), damp=damping).run("0.5")
    assert_solves(SparseGPT(), weight, hessian, "0.5", expected)
    solution = SparseGPT().solve(weight, freeze(hessian), Unstructured(0.5))
    assert len(solution.notes) == 1
    assert "not positive definite" in solution.notes[0]
    assert solution.notes[0].endswith(f"{damping:g}")


def test_a_sound_hessian_leaves_no_note():
    inputs = make_inputs(12)
    solution = SparseGPT().solve(make_weight(3, 12), freeze(inputs.T @ inputs), Unstructured(0.5))
    assert solution.notes == ()


def test_fewer_tokens_than_inputs_are_enough():
    inputs = make_inputs(60)[:10]
    weight, hessian = make_weight(8, 60), inputs.T @ inputs / 10
    expected = Oracle(weight, hessian.float()).run("0.5")
    assert_solves(SparseGPT(), weight, hessian, "0.5", expected)


@pytest.mark.parametrize("broken", ["very indefinite", "NaN"])
def test_a_hessian_that_stays_unusable_is_an_error_and_no_other_method(broken):
    hessian = torch.eye(8)
    # Eigenvalues 41 and -39 with a mean diagonal of 1: ten times the mean doesn't help.
    hessian[2, 1] = hessian[1, 2] = math.nan if broken == "NaN" else 40
    with pytest.raises(SolveError, match="not positive definite"):
        SparseGPT().solve(make_weight(3, 8), freeze(hessian), Unstructured(0.5))


def test_sparsegpt_asks_for_the_hessian():
    assert SparseGPT.needs is Needs.HESSIAN


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_it_prunes_as_well_as_a_loop_over_the_columns(pattern):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(900, 256, generator=generator)
    hessian = inputs.T @ inputs / len(inputs)
    weight = torch.randn(24, 256, generator=generator)
    ours = SparseGPT().solve(weight, Statistics(1, weight[:1], hessian=hessian), pattern).weight
    loop = sparsegpt_loop(weight, hessian, pattern)
    errors = [float((((w - weight) @ hessian) * (w - weight)).sum()) for w in (ours, loop)]
    assert errors[1] == pytest.approx(errors[0], rel=0.01)
    assert (loop == 0).float().mean() == pytest.approx(0.5, abs=0.01)
