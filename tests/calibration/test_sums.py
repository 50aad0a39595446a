"""Input statistics: sums over batches, the factor of the inverse Hessian, the error measure."""

import math

import pytest
import torch

from hf_sparse.calibration import sums
from hf_sparse.calibration.sums import StatisticsCollector
from hf_sparse.core.errors import SolveError
from hf_sparse.core.statistics import Needs, Statistics

CPU = torch.device("cpu")


def random_inputs(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))


def collect(batches: list[torch.Tensor], needs: Needs) -> Statistics:
    collector = StatisticsCollector(batches[0].shape[1], needs, len(batches), CPU)
    for batch in batches:
        collector.add(batch)
    return collector.finish()


def loop_hessian(inputs: torch.Tensor) -> torch.Tensor:
    """X'X / T, one token after the other in double precision."""
    total = torch.zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float64)
    for token in inputs.double():
        total += torch.outer(token, token)
    return total / len(inputs)


def loop_norms(inputs: torch.Tensor) -> list[float]:
    return [math.sqrt(sum(x * x for x in column) / len(column)) for column in inputs.T.tolist()]


# 130 and 300 columns: more than one strip of the triangle. 700 tokens: more than one flush.
@pytest.mark.parametrize("columns", [1, 7, 130, 300])
@pytest.mark.parametrize("sizes", [(1,), (5, 3, 9), (255, 1, 2), (700,), (300, 100, 300)])
def test_the_hessian_is_the_mean_outer_product_of_all_tokens(columns, sizes):
    batches = [random_inputs(size, columns, seed) for seed, size in enumerate(sizes)]
    sums = collect(batches, Needs.HESSIAN)
    expected = loop_hessian(torch.cat(batches))
    assert sums.hessian.dtype == torch.float32
    torch.testing.assert_close(sums.hessian.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(sums.hessian, sums.hessian.T)
    assert sums.tokens == sum(sizes)


@pytest.mark.parametrize("needs", [Needs.COLUMN_NORMS, Needs.HESSIAN])
def test_column_norms_are_root_mean_squares(needs):
    batches = [random_inputs(5, 9, 1), random_inputs(300, 9, 2)]
    norms = collect(batches, needs).column_norms
    torch.testing.assert_close(norms, torch.tensor(loop_norms(torch.cat(batches))))


def test_only_what_is_needed_is_collected():
    batch = [random_inputs(4, 3)]
    nothing, norms = collect(batch, Needs.NOTHING), collect(batch, Needs.COLUMN_NORMS)
    assert nothing.column_norms is None
    assert nothing.hessian is None
    assert norms.hessian is None
    assert torch.equal(nothing.sample, batch[0])


@pytest.mark.parametrize("needs", [Needs.COLUMN_NORMS, Needs.HESSIAN])
def test_half_precision_inputs_are_added_up_in_fp32(needs):
    inputs = random_inputs(600, 6).to(torch.bfloat16)
    norms = collect([inputs], needs).column_norms
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms, torch.tensor(loop_norms(inputs)), rtol=1e-5, atol=0)


def test_large_batches_are_counted_in_tiles(monkeypatch):
    monkeypatch.setattr(sums, "TILE_ROWS", 64)
    inputs, dense = random_inputs(650, 6).bfloat16(), random_inputs(650, 6, 1).bfloat16()
    collector = StatisticsCollector(6, Needs.HESSIAN, 1, CPU, cross=True)
    most = []
    add_tile = collector._add_tile

    def watched(rows, twins):
        most.append(len(rows))
        add_tile(rows, twins)

    monkeypatch.setattr(collector, "_add_tile", watched)
    collector.add(inputs, dense)
    found = collector.finish()
    assert max(most) == 64
    assert found.tokens == 650
    torch.testing.assert_close(found.hessian.double(), loop_hessian(inputs), rtol=1e-5, atol=1e-6)
    cross = sum(torch.outer(d, x) for d, x in zip(dense.double(), inputs.double(), strict=True))
    torch.testing.assert_close(found.cross.double(), cross / 650, rtol=1e-5, atol=1e-6)
    sample = {tuple(row) for row in inputs.float().tolist()}
    assert all(tuple(row) in sample for row in found.sample.tolist())


@pytest.mark.parametrize("needs", list(Needs))
def test_batches_are_left_as_they_were(needs):
    batches = [random_inputs(10, 5, 1), random_inputs(400, 5, 2)]
    before = [batch.clone() for batch in batches]
    collect(batches, needs)
    assert all(torch.equal(a, b) for a, b in zip(batches, before, strict=True))


@pytest.mark.parametrize("needs", list(Needs))
def test_a_batch_counts_as_it_was_when_it_was_added(needs):
    # Models change activations in place, and waiting ones are moved off the accelerator.
    batch = random_inputs(10, 5)
    collector = StatisticsCollector(5, needs, 1, CPU)
    collector.add(batch)
    expected = batch.clone()
    batch.fill_(100.0)
    sums = collector.finish()
    assert torch.equal(sums.sample, expected)
    if needs >= Needs.COLUMN_NORMS:
        torch.testing.assert_close(sums.column_norms, torch.tensor(loop_norms(expected)))


def test_a_batch_of_padding_alone_counts_nothing():
    batch = random_inputs(6, 4)
    with_empty = collect([batch[:0], batch, batch[:0]], Needs.HESSIAN)
    assert with_empty.tokens == 6
    torch.testing.assert_close(with_empty.hessian.double(), loop_hessian(batch))


def test_the_sample_consists_of_rows_of_every_batch_and_stays_small():
    batches = [random_inputs(400, 3, seed) for seed in range(4)]
    sample = collect(batches, Needs.COLUMN_NORMS).sample
    assert len(sample) == 512
    for batch in batches:
        rows = {tuple(row) for row in batch.tolist()}
        assert sum(tuple(row) in rows for row in sample.tolist()) == 128


def test_a_layer_without_tokens_is_an_error():
    with pytest.raises(SolveError, match="no calibration token"):
        collect([random_inputs(0, 4)], Needs.COLUMN_NORMS)


@pytest.mark.parametrize("needs", list(Needs))
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_inputs_that_are_not_finite_or_overflow_are_an_error(needs, bad):
    batch = random_inputs(5, 4)
    batch[3, 2] = bad
    with pytest.raises(SolveError, match="NaN or infinite"):
        collect([batch], needs)


def make_statistics(inputs: torch.Tensor) -> Statistics:
    return Statistics(
        len(inputs), inputs, torch.tensor(loop_norms(inputs)), loop_hessian(inputs).float()
    )


@pytest.mark.parametrize("columns", [1, 8, 33])
@pytest.mark.parametrize("damp", [0.01, 0.5])
def test_the_factor_is_the_upper_cholesky_factor_of_the_damped_inverse(columns, damp):
    sums = make_statistics(random_inputs(100, columns))
    factor = sums.inverse_factor(damp)
    damped = sums.hessian.double()
    damped = damped + damp * damped.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped)).T
    torch.testing.assert_close(factor.upper.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(factor.upper, factor.upper.triu())
    assert bool((factor.upper.diagonal() > 0).all())
    assert factor.damping == damp
    assert not factor.dead.any()


def test_a_dead_input_stands_alone_in_the_factor():
    inputs = random_inputs(50, 6)
    inputs[:, [1, 4]] = 0
    factor = make_statistics(inputs).inverse_factor(0.01)
    assert factor.dead.tolist() == [False, True, False, False, True, False]
    for j in (1, 4):
        others = [k for k in range(6) if k != j]
        assert not factor.upper[j, others].any()
        assert not factor.upper[others, j].any()


def test_the_factor_is_computed_once_for_each_damping():
    sums = make_statistics(random_inputs(50, 6))
    first = sums.inverse_factor(0.01)
    assert sums.inverse_factor(0.01) is first
    assert sums.inverse_factor(0.02) is not first
    assert sums.inverse_factor(0.02).damping == 0.02


def test_factorising_leaves_the_hessian_as_it_was():
    inputs = random_inputs(50, 6)
    inputs[:, 2] = 0
    sums = make_statistics(inputs)
    before = sums.hessian.clone()
    sums.inverse_factor(0.01)
    assert torch.equal(sums.hessian, before)


def test_the_damped_hessian_is_h_with_ones_for_dead_inputs_and_the_share_of_its_mean():
    inputs = random_inputs(50, 6)
    inputs[:, [1, 4]] = 0
    sums = make_statistics(inputs)
    before = sums.hessian.clone()
    damped = sums.damped_hessian(0.3)
    expected = loop_hessian(inputs)
    expected[1, 1] = expected[4, 4] = 1
    mean = sum(float(expected[j, j]) for j in range(6)) / 6
    for j in range(6):
        expected[j, j] += 0.3 * mean
    torch.testing.assert_close(damped.double(), expected, rtol=1e-5, atol=1e-6)
    assert sums.damped_hessian(0.3) is damped
    assert sums.damped_hessian(0.4) is not damped
    assert torch.equal(sums.hessian, before)


def test_the_damped_hessian_and_the_factor_are_inverses_of_each_other():
    inputs = random_inputs(60, 9)
    inputs[:, 3] = 0
    sums = make_statistics(inputs)
    upper = sums.inverse_factor(0.05).upper.double()
    product = upper.T @ upper @ sums.damped_hessian(0.05).double()
    torch.testing.assert_close(product, torch.eye(9, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sizes", [(1,), (5, 3, 9), (300, 0, 400)])
def test_the_cross_moment_pairs_each_token_with_its_twin_in_the_dense_model(sizes):
    collector = StatisticsCollector(7, Needs.HESSIAN, len(sizes), CPU, cross=True)
    total = torch.zeros(7, 7, dtype=torch.float64)
    for seed, size in enumerate(sizes):
        own, dense = random_inputs(size, 7, seed), random_inputs(size, 7, seed + 50)
        collector.add(own, dense)
        for x, twin in zip(own.double(), dense.double(), strict=True):
            total += torch.outer(twin, x)
    found = collector.finish().cross
    torch.testing.assert_close(found.double(), total / sum(sizes), rtol=1e-4, atol=1e-5)
    assert collect([random_inputs(4, 7)], Needs.HESSIAN).cross is None


def test_the_relative_error_compares_outputs_on_the_sample():
    inputs, before = random_inputs(7, 5), random_inputs(3, 5, seed=1)
    after = before * (before.abs() > 0.5)
    lost = reference = 0.0
    for x in inputs.tolist():
        for dense, pruned in zip(before.tolist(), after.tolist(), strict=True):
            y = sum(a * w for a, w in zip(x, dense, strict=True))
            z = sum(a * w for a, w in zip(x, pruned, strict=True))
            lost, reference = lost + (y - z) ** 2, reference + y**2
    expected = math.sqrt(lost / reference)
    assert make_statistics(inputs).relative_error(before, after) == pytest.approx(expected, 1e-5)
    assert expected > 0.01


def test_the_relative_error_of_a_layer_without_output_is_zero():
    sums = make_statistics(torch.zeros(4, 3))
    assert sums.relative_error(torch.ones(2, 3), torch.zeros(2, 3)) == 0.0
