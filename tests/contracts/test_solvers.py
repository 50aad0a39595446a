"""What every registered solver promises; a new one is tested by being registered."""

import math
from dataclasses import fields, is_dataclass, replace
from fractions import Fraction

import pytest
import torch
from cases import in_one_test

from conftest import assert_said
from hf_sparse import SparseConfig
from hf_sparse.calibration.sums import StatisticsCollector
from hf_sparse.config.recipes import get_solver
from hf_sparse.core.errors import ConfigError
from hf_sparse.core.patterns import NM, Pattern, Unstructured
from hf_sparse.core.statistics import Needs, Statistics
from hf_sparse.solvers import SOLVERS, Solution, Solver, make_solver
from hf_sparse.training.schedule import Partial

SHAPES = [(1, 1), (1, 9), (9, 1), (5, 17), (7, 40), (4, 131)]
UNSTRUCTURED = [0.0, 0.29, 0.5, 0.95]
N_OF_M = [(2, 4), (4, 8), (1, 4), (3, 5)]

every_solver = pytest.mark.parametrize("method", SOLVERS)
every_shape = in_one_test(shape=SHAPES)
pruning_solver = pytest.mark.parametrize(
    "method", [name for name, cls in SOLVERS.items() if not cls.chooses_pattern]
)


def make_weight(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0] * 1000 + shape[1]))


def make_statistics(columns: int, needs: Needs, dead: tuple[int, ...] = ()) -> Statistics:
    collector = StatisticsCollector(columns, Needs(needs), 2, torch.device("cpu"))
    for seed in range(2):
        generator = torch.Generator().manual_seed(10 * columns + seed)
        inputs = torch.randn(columns + 8, columns, generator=generator)
        inputs[:, list(dead)] = 0
        collector.add(inputs)
    return collector.finish()


def make(method: str) -> Solver:
    return make_solver(method, SparseConfig(method=method))


def solve(method: str, weight: torch.Tensor, pattern: Pattern, **kwargs) -> Solution:
    solver = make(method)
    return solver.solve(weight, make_statistics(weight.shape[1], solver.needs, **kwargs), pattern)


def patterns() -> list[Pattern]:
    return [*map(Unstructured, UNSTRUCTURED), *(NM(n, m) for n, m in N_OF_M)]


def pattern_id(pattern: Pattern) -> str:
    return f"{pattern}-{pattern.sparsity:g}"


every_pattern = pytest.mark.parametrize("pattern", patterns(), ids=pattern_id)


@every_solver
@every_shape
@every_pattern
def test_a_solution_is_an_fp32_weight_that_is_zero_outside_its_mask(method, shape, pattern):
    solution = solve(method, make_weight(shape), pattern)
    assert solution.weight.dtype == torch.float32
    assert solution.mask.dtype == torch.bool
    assert solution.weight.shape == solution.mask.shape == shape
    assert bool(torch.isfinite(solution.weight).all())
    assert not solution.weight[~solution.mask].any()


@pruning_solver
@every_shape
@in_one_test(percent=[0, 1, 29, 50, 95, 99])
def test_the_number_of_zeros_is_exactly_the_floor_of_the_share(method, shape, percent):
    mask = solve(method, make_weight(shape), Unstructured(percent / 100)).mask
    rows, columns = shape
    zeros = (~mask).sum(dim=1).tolist()
    # A method compares scores over the layer or within each row; its own tests say which.
    whole = sum(zeros) == percent * rows * columns // 100
    each_row = zeros == [percent * columns // 100] * rows
    assert whole or each_row, zeros


@pruning_solver
@every_shape
@pytest.mark.parametrize(("n", "m"), [*N_OF_M, (7, 16)])
def test_every_group_keeps_exactly_n_and_a_tail_its_ceiling(method, shape, n, m):
    mask = solve(method, make_weight(shape), NM(n, m)).mask
    for start in range(0, shape[1], m):
        group = mask[:, start : start + m]
        kept = math.ceil(Fraction(n * group.shape[1], m))
        assert group.sum(dim=1).tolist() == [kept] * shape[0]


@pruning_solver
@pytest.mark.parametrize("pattern", [Unstructured(0.29), NM(2, 4)], ids=pattern_id)
@pytest.mark.parametrize("value", [0.0, 0.25])
def test_ties_do_not_change_the_number_of_zeros(method, value, pattern):
    weight = torch.full((6, 20), value)
    solver = make(method)
    statistics = Statistics(20, torch.eye(20), torch.ones(20), torch.eye(20))
    zeros = int((~solver.solve(weight, statistics, pattern).mask).sum())
    assert zeros in ({60} if isinstance(pattern, NM) else {34, 6 * 5})


@pruning_solver
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=pattern_id)
def test_dead_inputs_do_not_change_the_number_of_zeros(method, pattern):
    mask = solve(method, make_weight((6, 20)), pattern, dead=(0, 1, 2, 3, 4, 19)).mask
    assert int((~mask).sum()) == 60


@every_solver
@every_shape
@every_pattern
def test_weight_and_statistics_are_left_as_they_were(method, shape, pattern):
    weight, solver = make_weight(shape), make(method)
    if getattr(solver, "spend_hessian", False):  # told to, where nobody asks for it again
        solver = replace(solver, spend_hessian=False)
    statistics = make_statistics(shape[1], Needs.HESSIAN)
    tensors = [weight, statistics.sample, statistics.column_norms, statistics.hessian]
    before = [tensor.clone() for tensor in tensors]
    solution = solver.solve(weight, statistics, pattern)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert solution.weight.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()


@every_solver
@every_pattern
def test_a_weight_stored_as_in_by_out_gives_the_same_result_and_is_left_as_it_was(method, pattern):
    # Conv1D's weight arrives as a transposed view of the module's own storage.
    stored = make_weight((40, 7))
    before = stored.clone()
    viewed = solve(method, stored.T, pattern)
    assert torch.equal(stored, before)
    copied = solve(method, before.T.contiguous(), pattern)
    assert torch.equal(viewed.mask, copied.mask)
    assert torch.equal(viewed.weight, copied.weight)


@every_solver
@every_shape
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=pattern_id)
def test_the_same_inputs_give_the_same_bytes(method, shape, pattern):
    first = solve(method, make_weight(shape), pattern)
    second = solve(method, make_weight(shape), pattern)
    assert first.weight.numpy().tobytes() == second.weight.numpy().tobytes()
    assert torch.equal(first.mask, second.mask)
    assert first.notes == second.notes


@pruning_solver
@pytest.mark.parametrize("shape", [(5, 17), (7, 40)], ids=str)
def test_a_sparsity_of_zero_changes_nothing(method, shape):
    weight = make_weight(shape)
    solution = solve(method, weight, Unstructured(0.0))
    assert torch.equal(solution.weight, weight)
    assert bool(solution.mask.all())


@pytest.mark.parametrize("method", [n for n, cls in SOLVERS.items() if cls.chooses_pattern])
def test_a_method_that_chooses_its_pattern_marks_the_zeros_of_the_weight(method):
    weight = make_weight((6, 20)) * (make_weight((20, 6)).T > 0)
    solution = solve(method, weight, Unstructured(0.0))
    assert torch.equal(solution.mask, solution.weight != 0)
    assert bool((weight[~solution.mask] == 0).all())


@every_solver
def test_a_solver_is_a_frozen_value_made_of_config_arguments(method):
    cls = SOLVERS[method]
    assert is_dataclass(cls)
    assert cls.name == method
    assert isinstance(cls.needs, Needs)
    config = SparseConfig(method=method)
    solver = make_solver(method, config)
    assert solver == make_solver(method, config)
    hash(solver)
    for field in fields(cls):
        assert getattr(solver, field.name) == getattr(config, field.name)
        with pytest.raises(AttributeError):
            setattr(solver, field.name, 1)


@every_solver
def test_a_solver_that_needs_no_data_works_without_statistics(method):
    solver = make(method)
    if solver.needs is Needs.NOTHING:
        solution = solver.solve(make_weight((4, 8)), None, Unstructured(0.5))
        assert solution.weight.shape == (4, 8)
    else:
        with pytest.raises(ConfigError, match="needs calibration data"):
            SparseConfig(method=method).check_data()


@pytest.mark.parametrize("name", ["optimal-brain", "", None, 3])
def test_an_unknown_method_is_refused_with_the_names_that_exist(name):
    with pytest.raises(ConfigError) as caught:
        get_solver(name)
    assert_said(caught, name, SOLVERS)


@pytest.mark.parametrize(
    "method",
    [n for n, cls in SOLVERS.items() if not cls.chooses_pattern and cls.needs < Needs.HESSIAN],
)
@pytest.mark.parametrize("final", [Unstructured(0.6), NM(2, 4)], ids=pattern_id)
def test_a_method_that_needs_no_hessian_prunes_step_by_step(method, final):
    weight, gone = make_weight((6, 20)), torch.zeros(6, 20, dtype=torch.bool)
    for half in (1, 2):
        mask = solve(method, weight, Partial.of(final, Fraction(half, 2), gone), dead=(3,)).mask
        assert not bool((mask & gone).any())
        assert int((~mask).sum()) == half * 6 * 20 * final.sparsity / 2
        gone = ~mask
