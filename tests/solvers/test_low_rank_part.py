"""The low-rank part: its fit against an SVD, how it alternates with a solver, what a layer does."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_sparse.core.errors import FormatError
from hf_sparse.core.grids import Grid
from hf_sparse.core.low_rank import KEY_A, KEY_B, LowRank
from hf_sparse.core.patterns import NM, Unstructured
from hf_sparse.core.statistics import Needs, Statistics
from hf_sparse.formats import FORMATS
from hf_sparse.layers import SparseLinear
from hf_sparse.solvers import Solution, Solver
from hf_sparse.solvers.layer_solver import LayerSolver
from hf_sparse.solvers.magnitude import Magnitude
from hf_sparse.solvers.refinement.low_rank import error_size, fit_low_rank
from hf_sparse.solvers.sparsegpt import SparseGPT

SHAPES = [(6, 10), (10, 6), (8, 8), (1, 5), (5, 1)]


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_hessian(size, seed=1):
    x = noise(3 * size, size, seed=seed) * torch.logspace(0, -1, size, dtype=torch.float64)
    return x.T @ x / len(x)


def make_statistics(size, tokens=200):
    x = noise(tokens, size, seed=3).float() @ noise(size, size, seed=4).float()
    norms = x.square().mean(0).sqrt()
    return Statistics(tokens, x[:64], norms, x.T @ x / tokens)


def oracle(residual, hessian, rank):
    """Truncated SVD of R C, times C^-1."""
    factor = torch.linalg.cholesky(hessian)
    u, s, v = torch.linalg.svd(residual @ factor, full_matrices=False)
    cut = u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]
    return cut @ torch.linalg.inv(factor)


def loss(difference, hessian):
    return float(torch.trace(difference.double() @ hessian.double() @ difference.double().T))


# --- the fit ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_fit_is_the_truncated_svd_in_the_metric_of_the_inputs(shape):
    residual, hessian = noise(*shape), make_hessian(shape[1])
    for rank in range(1, min(shape) + 1):
        low_rank = fit_low_rank(residual.float(), hessian.float(), rank)
        assert low_rank.b.shape == (shape[0], rank)
        assert low_rank.a.shape == (rank, shape[1])
        expected = oracle(residual, hessian, rank)
        torch.testing.assert_close(low_rank.product().double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)], ids=str)
def test_the_fit_of_what_has_a_lower_rank_is_exact_and_finite(shape):
    residual = (noise(shape[0], 1) @ noise(1, shape[1], seed=5)).float()
    for target in (residual, torch.zeros_like(residual)):
        low_rank = fit_low_rank(target, make_hessian(shape[1]).float(), 4)
        torch.testing.assert_close(low_rank.product(), target, rtol=1e-5, atol=1e-5)
        assert all(bool(torch.isfinite(t).all()) for t in low_rank.tensors().values())


def test_the_fit_needs_no_positive_definite_metric():
    residual, x = noise(7, 9), noise(4, 9, seed=2)
    hessian = x.T @ x
    low_rank = fit_low_rank(residual.float(), hessian.float(), 2)
    left = loss(residual - low_rank.product(), hessian)
    tail = torch.linalg.svdvals(residual @ x.T)[2:].square().sum()
    assert left == pytest.approx(float(tail), rel=1e-4)


def test_both_factors_of_the_fit_have_the_same_norms():
    low_rank = fit_low_rank(noise(6, 10).float(), make_hessian(10).float(), 3)
    torch.testing.assert_close(low_rank.b.norm(dim=0), low_rank.a.norm(dim=1))


def test_the_size_of_an_error_is_the_trace():
    difference, hessian = noise(4, 6), make_hessian(6)
    expected = loss(difference, hessian)
    assert float(error_size(difference.float(), hessian.float())) == pytest.approx(expected)


# --- alternating with a solver ------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded(Solver):
    """Magnitude pruning that remembers its targets, and is bad from the third call on."""

    name: ClassVar[str] = "recorded"
    needs: ClassVar[Needs] = Needs.NOTHING
    chooses_pattern: ClassVar[bool] = False
    seen: tuple[list, ...] = ([],)

    def solve(self, weight, statistics, pattern):
        self.seen[0].append(weight.clone())
        solution = Magnitude().solve(weight, statistics, pattern)
        if len(self.seen[0]) < 3:
            return solution
        return Solution(torch.zeros_like(weight), solution.mask)


def test_each_round_solves_what_the_last_low_rank_part_leaves_and_the_best_one_is_kept():
    weight, statistics = noise(12, 20, seed=7).float(), make_statistics(20)
    solver = Recorded(seen=([],))
    solution = LayerSolver(solver, 0, 0.01, low_rank=3).solve(weight, statistics, Unstructured(0.5))
    hessian = statistics.damped_hessian(0.01)
    goal, rounds = weight, []
    for target in solver.seen[0][:2]:
        torch.testing.assert_close(target, goal, rtol=1e-4, atol=1e-4)
        sparse = Magnitude().solve(target, None, Unstructured(0.5)).weight
        product = oracle((weight - sparse).double(), hessian.double(), 3)
        goal = weight - product.float()
        rounds.append((loss(goal - sparse, hessian), sparse))
    best = min(rounds, key=lambda r: r[0])
    torch.testing.assert_close(solution.weight, best[1], rtol=1e-4, atol=1e-4)
    difference = weight - solution.weight - solution.low_rank.product()
    assert loss(difference, hessian) == pytest.approx(best[0], rel=1e-4)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
@pytest.mark.parametrize("refit", [0, 10])
@pytest.mark.parametrize("shape", [(16, 24), (24, 16)], ids=str)
def test_the_result_is_better_than_the_sparse_part_alone_and_meets_the_pattern(
    pattern, refit, shape
):
    weight, statistics = noise(*shape, seed=7).float(), make_statistics(shape[1])
    hessian = statistics.damped_hessian(0.01)
    before = weight.clone()
    alone = LayerSolver(SparseGPT(), refit, 0.01).solve(weight, statistics, pattern)
    assert alone.low_rank is None
    start = loss(weight - alone.weight, hessian)
    last = start
    for rank in (1, 4, 16):
        both = LayerSolver(SparseGPT(), refit, 0.01, low_rank=rank).solve(
            weight, statistics, pattern
        )
        assert both.low_rank.rank == rank
        assert int((both.weight == 0).sum()) >= weight.numel() // 2
        assert bool((both.weight[~both.mask] == 0).all())
        assert int((~both.mask).sum()) == weight.numel() // 2
        if isinstance(pattern, NM):
            assert bool((both.mask.reshape(-1, 4).sum(1) == 2).all())
        left = loss(weight - both.weight - both.low_rank.product(), hessian)
        assert left < last
        last = left
    assert last < 1e-6 * start  # of full rank it makes up for everything
    assert torch.equal(weight, before)


def test_with_a_grid_the_sparse_part_lies_on_it_and_the_low_rank_part_knows():
    weight, statistics = noise(16, 24, seed=7).float(), make_statistics(24)
    method = LayerSolver(SparseGPT(), 5, 0.01, Grid(4, 8, True), low_rank=2)
    solution = method.solve(weight, statistics, NM(2, 4))
    assert torch.equal(solution.weight, solution.quantized.dequantize())
    hessian = statistics.damped_hessian(0.01)
    expected = oracle((weight - solution.weight).double(), hessian.double(), 2)
    torch.testing.assert_close(solution.low_rank.product().double(), expected, rtol=1e-3, atol=1e-4)


def test_dense_targets_are_what_both_parts_together_come_close_to():
    weight, plain = noise(16, 24, seed=7).float(), make_statistics(24)
    cross = plain.hessian + 0.1 * noise(24, 24, seed=9).float()
    statistics = Statistics(plain.tokens, plain.sample, None, plain.hessian, cross)
    method = LayerSolver(SparseGPT(), 0, 0.01, low_rank=16)
    solution = method.solve(weight, statistics, NM(2, 4))
    hessian = plain.hessian.double()
    damped = statistics.damped_hessian(0.01).double()
    target = weight + weight.double() @ (cross.double() - hessian) @ torch.linalg.inv(damped)
    torch.testing.assert_close(
        (solution.weight + solution.low_rank.product()).double(), target, rtol=1e-3, atol=1e-3
    )


# --- the value ----------------------------------------------------------------------------------


def test_the_sum_is_rounded_once():
    low_rank = LowRank(noise(5, 2).bfloat16(), noise(2, 7, seed=1).bfloat16())
    weight = noise(5, 7, seed=2).bfloat16()
    exact = weight.double() + low_rank.b.double() @ low_rank.a.double()
    assert torch.equal(low_rank.added_to(weight), exact.float().bfloat16())


@pytest.mark.parametrize(
    ("b", "a", "message"),
    [
        (torch.ones(5, 2), torch.ones(3, 7), rf"{KEY_B} has shape \(5, 2\), expected \(5, 3\)"),
        (torch.ones(5, 2), torch.ones(2, 6), rf"{KEY_A} has shape \(2, 6\), expected \(2, 7\)"),
        (torch.ones(5, 6), torch.ones(6, 7), r"low_rank is 6, .* takes 1 to 5"),
        (torch.ones(5, 0), torch.ones(0, 7), r"low_rank is 0"),
        (torch.ones(5, 2), torch.ones(2, 7, dtype=torch.int64), rf"{KEY_A} has dtype torch.int64"),
        (torch.ones(5, 2) / 0, torch.ones(2, 7), rf"{KEY_B} holds NaN or infinite"),
    ],
)
def test_factors_that_do_not_suit_the_weight_are_named(b, a, message):
    with pytest.raises(FormatError, match=message):
        LowRank(b, a).check((5, 7))


# --- the layer ----------------------------------------------------------------------------------


def make_layer(name="bitmask", dtype=torch.float32, resolved=False, rank=2):
    weight = noise(8, 12).to(dtype)
    weight[:, 0::4] = weight[:, 3::4] = 0
    fmt = FORMATS[name].fits(weight, NM(2, 4)).format
    low_rank = LowRank(noise(8, rank, seed=1).to(dtype), noise(rank, 12, seed=2).to(dtype))
    bias = nn.Parameter(noise(8, seed=3).to(dtype))
    layer = SparseLinear(fmt, fmt.pack(weight), (8, 12), dtype, bias, low_rank=low_rank)
    if resolved:
        layer.resolve()
    return layer, weight, low_rank


every_form = pytest.mark.parametrize("resolved", [False, True], ids=["stored", "resolved"])
every_format = pytest.mark.parametrize("name", FORMATS)


@every_form
@every_format
def test_the_layer_multiplies_by_both_parts_and_passes_gradients(name, resolved):
    layer, weight, low_rank = make_layer(name, resolved=resolved)
    whole = weight + low_rank.b @ low_rank.a
    torch.testing.assert_close(layer.weight, whole)
    assert torch.equal(layer.sparse_weight, weight)
    x, other = (noise(2, 3, 12, seed=5).float().requires_grad_() for _ in range(2))
    y, expected = layer(x), F.linear(other, whole, layer.bias)
    torch.testing.assert_close(y, expected)
    grads = torch.autograd.grad(y.square().sum(), [x, layer.bias])
    wanted = torch.autograd.grad(expected.square().sum(), [other, layer.bias])
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, want)


@every_form
def test_its_state_holds_both_factors_and_loads_them_back(resolved):
    layer, weight, low_rank = make_layer(resolved=resolved)
    state = layer.state_dict()
    assert set(state) == {"bias", "weight_values", "weight_bitmask", KEY_A, KEY_B}
    assert torch.equal(state[KEY_A], low_rank.a)
    assert torch.equal(state[KEY_B], low_rank.b)
    other = make_layer(resolved=resolved)[0]
    other.load_state_dict({k: v * 2 if v.is_floating_point() else v for k, v in state.items()})
    torch.testing.assert_close(other.weight, 2 * weight + 4 * low_rank.b @ low_rank.a)
    with pytest.raises(FormatError, match=KEY_A):
        other.load_state_dict({**state, KEY_A: state[KEY_A] / 0})


@every_form
def test_copies_and_casts_take_the_low_rank_part_along(resolved):
    layer, weight, low_rank = make_layer(resolved=resolved)
    cast = copy.deepcopy(layer).to(torch.bfloat16)
    assert cast.low_rank.a.dtype == cast.low_rank.b.dtype == torch.bfloat16
    expected = low_rank.to(torch.bfloat16).added_to(weight.bfloat16())
    assert torch.equal(cast.weight, expected)
    assert cast(torch.ones(1, 12, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert torch.equal(layer.low_rank.a, low_rank.a)


@every_form
def test_factors_narrower_than_the_input_are_widened(resolved):
    layer, _, low_rank = make_layer(resolved=resolved)
    for key, tensor in low_rank.to(torch.bfloat16).tensors().items():
        setattr(layer, key, tensor)
    x = noise(3, 12, seed=5).float()
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


@every_form
def test_resident_bytes_count_it_and_it_can_be_dropped(resolved):
    layer, weight, _ = make_layer(resolved=resolved)
    with_it = layer.resident_bytes()
    assert "low_rank=2" in repr(layer)
    layer.drop_low_rank()
    assert with_it - layer.resident_bytes() == 4 * 2 * (8 + 12)
    assert layer.low_rank is None
    assert "low_rank" not in repr(layer)
    assert torch.equal(layer.weight, weight)
    x = noise(3, 12, seed=5).float()
    torch.testing.assert_close(layer(x), F.linear(x, weight, layer.bias))
    assert set(layer.state_dict()) == {"bias", "weight_values", "weight_bitmask"}
