"""One layer's way from dense to pruned: targets against normal equations, and what is composed."""

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from layer_oracle import damped, make_weight

from hf_sparse.core.errors import SolveError
from hf_sparse.core.patterns import NM, Unstructured
from hf_sparse.core.statistics import Needs, OutputMetric, Statistics
from hf_sparse.solvers import Solution, Solver
from hf_sparse.solvers.layer_solver import LayerSolver, dense_target
from hf_sparse.solvers.magnitude import Magnitude
from hf_sparse.solvers.sparsegpt import SparseGPT

DAMP = 0.01


def make_paths(columns: int, tokens: int = 200, dead: tuple[int, ...] = ()):
    """The same tokens' inputs in the pruned and in the dense model, double precision."""
    generator = torch.Generator().manual_seed(columns)
    dense = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    dense += 0.5 * torch.randn(tokens, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    pruned = dense + 0.3 * noise
    pruned[:, list(dead)] = 0
    return pruned, dense


def freeze(pruned: torch.Tensor, dense: torch.Tensor | None = None) -> Statistics:
    hessian = (pruned.T @ pruned / len(pruned)).float()
    cross = None if dense is None else (dense.T @ pruned / len(pruned)).float()
    norms = hessian.diagonal().sqrt()
    return Statistics(len(pruned), pruned[:8].float(), norms, hessian, cross)


def loss(weight, target, statistics) -> float:
    difference = weight.double() - target.double()
    return float((difference @ damped(statistics.hessian, DAMP) * difference).sum())


@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (7, 33)], ids=str)
@pytest.mark.parametrize("streams", [False, True])
def test_the_target_solves_the_damped_normal_equations(shape, streams):
    pruned, dense = make_paths(shape[1])
    weight, tokens = make_weight(*shape), len(pruned)
    generator = torch.Generator().manual_seed(5)
    missing = torch.randn(tokens, shape[0], generator=generator, dtype=torch.float64) * streams
    hessian = pruned.T @ pruned / tokens
    lam = DAMP * hessian.diagonal().mean()
    # (X'X / T + lam I) V' = X' (Xd W' + Rd - R) / T + lam W'
    right = pruned.T @ (dense @ weight.double().T + missing) / tokens + lam * weight.double().T
    identity = torch.eye(shape[1], dtype=torch.float64)
    expected = torch.linalg.solve(hessian + lam * identity, right).T
    residual = (missing.T @ pruned / tokens).float() if streams else None
    found = dense_target(weight, freeze(pruned, dense), DAMP, residual)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, weight, atol=1e-2)


def test_the_target_of_equal_paths_is_the_weight():
    pruned, _ = make_paths(12)
    weight = make_weight(5, 12)
    found = dense_target(weight, freeze(pruned, pruned), DAMP)
    torch.testing.assert_close(found, weight, rtol=0, atol=1e-6)


def test_a_dead_input_keeps_its_target():
    pruned, dense = make_paths(12, dead=(3, 8))
    weight = make_weight(5, 12)
    found = dense_target(weight, freeze(pruned, dense), DAMP)
    torch.testing.assert_close(found[:, [3, 8]], weight[:, [3, 8]])


def test_without_refit_and_dense_path_it_is_the_solver_s_own_result():
    pruned, _ = make_paths(24)
    weight, statistics = make_weight(6, 24), freeze(pruned)
    plain = SparseGPT().solve(weight, statistics, Unstructured(0.5))
    found = LayerSolver(SparseGPT(), 0, DAMP).solve(weight, statistics, Unstructured(0.5))
    assert torch.equal(found.weight, plain.weight)
    assert torch.equal(found.mask, plain.mask)


def test_a_solver_that_needs_no_data_gets_none():
    found = LayerSolver(Magnitude(), 0, DAMP).solve(make_weight(4, 8), None, NM(2, 4))
    assert int((~found.mask).sum()) == 16


@pytest.mark.parametrize("solver", [Magnitude(), SparseGPT()], ids=lambda s: s.name)
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_the_refit_keeps_mask_and_notes_and_comes_closer(solver, pattern):
    pruned, _ = make_paths(24)
    weight, statistics = make_weight(6, 24), freeze(pruned)
    plain = LayerSolver(solver, 0, DAMP).solve(weight, statistics, pattern)
    found = LayerSolver(solver, 10, DAMP).solve(weight, statistics, pattern)
    assert torch.equal(found.mask, plain.mask)
    assert found.notes == plain.notes
    assert not found.weight[~found.mask].any()
    assert loss(found.weight, weight, statistics) < 0.99 * loss(plain.weight, weight, statistics)


def test_mask_and_refit_see_the_dense_model_s_target_in_place_of_the_weight():
    pruned, dense = make_paths(24)
    weight, statistics = make_weight(6, 24), freeze(pruned, dense)
    target = dense_target(weight, statistics, DAMP)
    found = LayerSolver(Magnitude(), 60, DAMP).solve(weight, statistics, Unstructured(0.5))
    order = target.abs().flatten().argsort()
    assert not found.mask.flatten()[order[:72]].any()
    assert found.mask.flatten()[order[72:]].all()
    matrix = damped(statistics.hessian, DAMP)
    for i, kept in enumerate(found.mask):
        right = (matrix @ target[i].double())[kept]
        best = torch.linalg.solve(matrix[kept][:, kept], right)
        torch.testing.assert_close(found.weight[i, kept].double(), best, rtol=1e-3, atol=1e-4)


def test_an_output_metric_is_refitted_in_after_the_inputs_metric():
    pruned, _ = make_paths(10)
    weight, statistics = make_weight(4, 10), freeze(pruned)
    mixed = torch.randn(4, 30, generator=torch.Generator().manual_seed(2))
    gram = mixed @ mixed.T / 30
    metric = OutputMetric(gram.diagonal().clone(), gram)
    solver = LayerSolver(Magnitude(), 100, DAMP)
    found = solver.solve(weight, statistics, Unstructured(0.5), metric=metric)
    weighted = gram.double() / gram.diagonal().mean() + 0.02 * torch.eye(4, dtype=torch.float64)
    system = torch.kron(weighted, damped(statistics.hessian, DAMP))
    kept = found.mask.flatten()
    best = torch.linalg.solve(system[kept][:, kept], (system @ weight.double().flatten())[kept])
    torch.testing.assert_close(found.weight[found.mask].double(), best, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1)], ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95])
def test_the_smallest_layers_are_solved(shape, sparsity):
    pruned, dense = make_paths(shape[1])
    weight = make_weight(*shape)
    metric = OutputMetric(torch.ones(shape[0]), torch.eye(shape[0]))
    for method in (Magnitude(), SparseGPT()):
        found = LayerSolver(method, 10, DAMP).solve(
            weight, freeze(pruned, dense), Unstructured(sparsity), metric=metric
        )
        assert bool(torch.isfinite(found.weight).all())
        assert not found.weight[~found.mask].any()


def test_a_gram_is_relative_to_its_mean_diagonal_and_a_sketch_is_raised_to_the_exact_one():
    gram = torch.tensor([[2.0, 1], [1, 6]])
    whole = OutputMetric(gram.diagonal().clone(), gram)
    sketch = OutputMetric(torch.tensor([3.0, 1.0]), sketch=torch.tensor([[1.0, 2.0]]))
    none = OutputMetric(torch.zeros(2), torch.zeros(2, 2))
    raised = torch.tensor([[3.0, 2], [2, 4]])
    for metric, expected in ((whole, gram / 4), (sketch, raised / 2), (none, torch.zeros(2, 2))):
        found = metric.relative(0.5)
        expected = expected + 0.5 * torch.eye(2)
        torch.testing.assert_close(found.times(torch.eye(2)), expected)
        torch.testing.assert_close(found.diagonal, expected.diagonal())


@dataclass(frozen=True)
class Broken(Solver):
    name: ClassVar[str] = "broken"
    needs: ClassVar[Needs] = Needs.NOTHING
    chooses_pattern: ClassVar[bool] = False
    value: float = math.nan

    def solve(self, weight, statistics, pattern) -> Solution:
        mask = pattern.mask(weight.abs())
        return Solution(torch.full_like(weight, self.value).where(mask, 0), mask)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("refit", [0, 5])
def test_a_result_that_is_not_finite_is_an_error(value, refit):
    pruned, _ = make_paths(8)
    solver = LayerSolver(Broken(value), refit, DAMP)
    with pytest.raises(SolveError, match="not finite"):
        solver.solve(make_weight(3, 8), freeze(pruned), Unstructured(0.5))


def test_a_hessian_that_is_not_finite_is_an_error_before_the_refit():
    statistics = freeze(make_paths(8)[0])
    statistics.hessian[2, 1] = statistics.hessian[1, 2] = math.nan
    with pytest.raises(SolveError, match="NaN or infinite"):
        LayerSolver(Magnitude(), 5, DAMP).solve(make_weight(3, 8), statistics, Unstructured(0.5))
