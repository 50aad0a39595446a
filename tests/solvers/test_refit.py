"""The refit against solves in double precision: row by row, and the dense Kronecker system."""

import pytest
import torch

from hf_sparse.core.statistics import OutputMetric
from hf_sparse.solvers.refinement.refit import OUTPUT_DAMPING, keep_better, refit, refit_fisher


def spd(size: int, condition: float = 100.0, seed: int = 0) -> torch.Tensor:
    """Symmetric, positive definite, with just that condition, in double precision."""
    generator = torch.Generator().manual_seed(size + 1000 * seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(0, -torch.tensor(condition).log10().item(), size, dtype=torch.float64)
    return basis @ torch.diag(values) @ basis.T


def problem(rows: int, columns: int, share: float = 0.5, seed: int = 0):
    """A target, and a mask that keeps about `share` of it."""
    generator = torch.Generator().manual_seed(100 * rows + columns + 7919 * seed)
    target = torch.randn(rows, columns, generator=generator)
    return target, torch.rand(rows, columns, generator=generator) < share


def of_outputs(gram: torch.Tensor) -> OutputMetric:
    return OutputMetric(gram.diagonal().clone(), gram)


def row_losses(weight, target, hessian) -> torch.Tensor:
    difference = weight.double() - target.double()
    return torch.stack([row @ hessian.double() @ row for row in difference])


def fisher_loss(weight, target, hessian, metric) -> float:
    difference = weight.double() - target.double()
    return float((metric.double() @ difference @ hessian.double() @ difference.T).trace())


def least_squares(target, mask, hessian) -> torch.Tensor:
    """The best values for the mask: every row's normal equations on what it keeps."""
    weight = torch.zeros(target.shape, dtype=torch.float64)
    for i, kept in enumerate(mask):
        if kept.any():
            right = (hessian.double() @ target[i].double())[kept]
            weight[i, kept] = torch.linalg.solve(hessian.double()[kept][:, kept], right)
    return weight


def kronecker_solution(target, mask, hessian, metric) -> torch.Tensor:
    """The best values for the mask in the Fisher metric, from the whole (out in)^2 system."""
    system = torch.kron(metric.double(), hessian.double())
    kept = mask.flatten()
    weight = torch.zeros(kept.shape, dtype=torch.float64)
    right = (system @ target.double().flatten())[kept]
    weight[kept] = torch.linalg.solve(system[kept][:, kept], right)
    return weight.view(target.shape)


def test_inputs_of_any_scale_that_do_not_correlate_take_one_step():
    """What the preconditioner is for: it divides by the diagonal, which here is all there is."""
    target, mask = problem(5, 17)
    found = refit(torch.zeros_like(target), target, mask, torch.logspace(-2, 2, 17).diag(), 1)
    torch.testing.assert_close(found, target * mask)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (5, 17), (12, 40)], ids=str)
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_enough_steps_reach_the_least_squares_solution_on_the_mask(shape, share):
    target, mask = problem(*shape, share)
    hessian = spd(shape[1]).float()
    found = refit(target * mask, target, mask, hessian, 100)
    expected = least_squares(target, mask, hessian)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_ten_steps_remove_most_of_what_can_be_removed():
    target, mask = problem(16, 64)
    hessian = spd(64).float()
    start = target * mask
    first = row_losses(start, target, hessian).sum()
    best = row_losses(least_squares(target, mask, hessian), target, hessian).sum()
    found = row_losses(refit(start, target, mask, hessian, 10), target, hessian).sum()
    assert best < 0.9 * first
    assert found - best < 0.1 * (first - best)


@pytest.mark.parametrize("condition", [1e2, 1e6])
@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 3, 50])
def test_no_row_ends_worse_than_it_began(condition, share, steps):
    target, mask = problem(9, 33, share)
    hessian = spd(33, condition).float()
    start = target * mask * 0.9
    before = row_losses(start, target, hessian)
    after = row_losses(refit(start, target, mask, hessian, steps), target, hessian)
    assert bool((after <= before * (1 + 1e-4)).all())
    assert after.sum() < before.sum()


def test_a_badly_conditioned_hessian_still_gives_a_finite_weight_near_the_best_loss():
    target, mask = problem(9, 33)
    hessian = spd(33, 1e6).float()
    found = refit(target * mask, target, mask, hessian, 200)
    best = row_losses(least_squares(target, mask, hessian), target, hessian).sum()
    assert bool(torch.isfinite(found).all())
    assert row_losses(found, target, hessian).sum() < 1.05 * best


@pytest.mark.parametrize("steps", [1, 20])
def test_what_the_mask_removed_stays_exactly_zero(steps):
    target, mask = problem(7, 30)
    hessian, metric = spd(30).float(), spd(7).float()
    plain = refit(target * mask, target, mask, hessian, steps)
    weighted = refit_fisher(target * mask, target, mask, hessian, of_outputs(metric), steps)
    for found in (plain, weighted):
        assert not found[~mask].any()
        assert not torch.equal(found, target * mask)


def test_no_steps_change_nothing():
    target, mask = problem(5, 12)
    start = target * mask
    assert torch.equal(refit(start, target, mask, spd(12).float(), 0), start)
    found = refit_fisher(start, target, mask, spd(12).float(), of_outputs(spd(5).float()), 0)
    assert torch.equal(found, start)


def test_arguments_are_left_as_they_were():
    target, mask = problem(5, 12)
    tensors = [target * mask, target, mask, spd(12).float(), spd(5).float()]
    before = [tensor.clone() for tensor in tensors]
    refit(*tensors[:4], 5)
    refit_fisher(*tensors[:4], of_outputs(tensors[4]), 5)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_rows_that_are_optimal_stay_what_they_are():
    target, mask = problem(6, 20)
    mask[:2] = True
    hessian = spd(20).float()
    start = target * mask
    found = refit(start, target, mask, hessian, 20)
    assert torch.equal(found[:2], target[:2])  # nothing to gain: not a bit changes
    best = least_squares(target, mask, hessian).float()
    again = refit(best, target, mask, hessian, 20)
    torch.testing.assert_close(again, best, rtol=1e-4, atol=1e-5)


def test_rows_of_zeros_and_rows_without_a_kept_weight_stay_zero():
    target, mask = problem(6, 20)
    target[0], mask[1] = 0, False
    hessian, metric = spd(20).float(), torch.eye(6)
    for found in (
        refit(target * mask, target, mask, hessian, 20),
        refit_fisher(target * mask, target, mask, hessian, of_outputs(metric), 20),
    ):
        assert not found[:2].any()
        assert bool(torch.isfinite(found).all())


def test_a_dead_input_stands_alone_and_what_is_kept_of_it_is_the_target_s():
    target, mask = problem(6, 20)
    inputs = torch.randn(50, 20, generator=torch.Generator().manual_seed(3))
    inputs[:, [2, 11]] = 0
    hessian = inputs.T @ inputs / 50
    hessian[2, 2] = hessian[11, 11] = 1
    hessian.diagonal().add_(0.01)
    start = target * mask
    start[:, 2] *= 0.5
    found = refit(start, target, mask, hessian, 60)
    torch.testing.assert_close(found[:, [2, 11]], (target * mask)[:, [2, 11]])
    expected = least_squares(target, mask, hessian)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1), (4, 7), (6, 9)], ids=str)
def test_the_fisher_refit_reaches_the_solution_of_the_kronecker_system(shape):
    target, mask = problem(*shape, 0.6)
    hessian, metric = spd(shape[1], 20).float(), spd(shape[0], 20, seed=1).float()
    metric /= metric.diagonal().mean()
    damped = metric.double() + OUTPUT_DAMPING * torch.eye(len(metric), dtype=torch.float64)
    found = refit_fisher(target * mask, target, mask, hessian, of_outputs(metric), 60)
    expected = kronecker_solution(target, mask, hessian, damped)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


def test_a_sketch_of_the_metric_is_refitted_in_as_the_matrix_it_stands_for():
    target, mask = problem(7, 12)
    sketch = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    diagonal = sketch.square().sum(dim=0) * torch.tensor([1, 1, 1, 1, 1, 2, 3.0])
    matrix = sketch.T @ sketch
    matrix.diagonal().copy_(diagonal)
    found, expected = (
        refit_fisher(target * mask, target, mask, spd(12).float(), metric, 5)
        for metric in (OutputMetric(diagonal, sketch=sketch), OutputMetric(diagonal, matrix))
    )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 3, 20])
@pytest.mark.parametrize("condition", [10.0, 1e6])
def test_the_fisher_refit_is_never_worse_than_its_start_in_its_own_metric(steps, condition):
    target, mask = problem(8, 24)
    hessian, metric = spd(24, condition).float(), spd(8, 50, seed=2).float()
    metric /= metric.diagonal().mean()
    damped = metric + OUTPUT_DAMPING * torch.eye(8)
    start = refit(target * mask, target, mask, hessian, 10)
    found = refit_fisher(start, target, mask, hessian, of_outputs(metric), steps)
    before = fisher_loss(start, target, hessian, damped)
    assert fisher_loss(found, target, hessian, damped) <= before * (1 + 1e-5)


def test_outputs_that_the_loss_does_not_feel_are_damped_and_the_result_is_finite():
    target, mask = problem(6, 15)
    hessian = spd(15).float()
    metric = torch.diag(torch.tensor([0.0, 0, 2, 2, 1, 1]))
    found = refit_fisher(target * mask, target, mask, hessian, of_outputs(metric), 200)
    # The metric is diagonal: rows don't mix, so the inputs metric's solution is this one's.
    expected = least_squares(target, mask, hessian)
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-2)
    none = refit_fisher(target * mask, target, mask, hessian, of_outputs(torch.zeros(6, 6)), 200)
    torch.testing.assert_close(none.double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_refit_that_overflows_gives_its_start_back():
    target, mask = problem(4, 9)
    hessian = 1e25 * spd(9).float()
    start = 1e20 * target * mask
    assert torch.equal(refit(start, 1e20 * target, mask, hessian, 5), start)
    found = refit_fisher(start, 1e20 * target, mask, hessian, of_outputs(torch.eye(4)), 5)
    assert torch.equal(found, start)


def test_of_two_weights_each_row_is_the_closer_one():
    target = torch.zeros(3, 2)
    one, other = torch.tensor([[1.0, 0], [0, 2], [1, 1]]), torch.tensor([[0, 1.0], [1, 0], [1, 1]])
    found = keep_better(one, other, target, torch.diag(torch.tensor([4.0, 1.0])))
    # Losses 4, 4, 5 against 1, 4, 5: of equal ones the second is returned.
    assert torch.equal(found, torch.stack([other[0], other[1], other[2]]))
    swapped = keep_better(other, one, target, torch.diag(torch.tensor([4.0, 1.0])))
    assert torch.equal(swapped, torch.stack([other[0], one[1], one[2]]))
