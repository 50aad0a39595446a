"""How sparsity is spread: budgets met to the zero, clamps, and the curves against plain loops."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparse.core.errors import ConfigError
from hf_sparse.core.patterns import Unstructured
from hf_sparse.pruning.allocation import (
    CLAMP,
    cost_quantiles,
    explicit_curves,
    fisher_curves,
    meet_budget,
    outlier_share,
    owl_curves,
)
from hf_sparse.pruning.sparsity_per_layer import HIGHEST, LOWEST, exactly

sparsities = st.integers(0, 99).map(lambda percent: percent / 100)
layer_sizes = st.lists(st.integers(1, 5000), min_size=1, max_size=8)


def named(values) -> dict:
    return {f"layer{i}": value for i, value in enumerate(values)}


def uniform_budget(sizes, sparsity: float) -> int:
    return sum(math.floor(Fraction(str(sparsity)) * n) for n in sizes)


def limits(sparsity: float) -> tuple[float, float]:
    """The clamps: within CLAMP of the mean, and at most half of what is left."""
    return max(0.0, sparsity - CLAMP), min(sparsity + CLAMP, (1 + sparsity) / 2)


def assert_in_clamps(zeros, sizes, sparsity: float) -> None:
    low, high = limits(sparsity)
    for name, n in sizes.items():
        assert math.floor(low * n - 1e-6) <= zeros[name] <= high * n + 1e-6
        assert zeros[name] < n or n == 0


@given(layer_sizes, sparsities, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_owl_meets_every_budget_within_its_clamps(sizes, sparsity, random):
    sizes = named(sizes)
    outliers = {name: random.choice([0.0, 0.01, random.random()]) for name in sizes}
    budget = uniform_budget(sizes.values(), sparsity)
    zeros = meet_budget(owl_curves(outliers, sparsity), sizes, budget, LOWEST, HIGHEST)
    assert sum(zeros.values()) == budget
    assert_in_clamps(zeros, sizes, sparsity)


@given(layer_sizes, sparsities, st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_fisher_meets_every_budget_within_its_clamps_also_with_ties_and_zeros(
    sizes, sparsity, seed
):
    sizes = named(sizes)
    generator = torch.Generator().manual_seed(seed)
    costs = {}
    for name, n in sizes.items():
        weight = torch.randn(1, n, generator=generator)
        weight = weight.round(decimals=seed % 3) * float(torch.rand(1, generator=generator) > 0.1)
        costs[name] = cost_quantiles(weight, torch.ones(1), torch.ones(n))
    budget = uniform_budget(sizes.values(), sparsity)
    zeros = meet_budget(fisher_curves(costs, sparsity), sizes, budget, LOWEST, HIGHEST)
    assert sum(zeros.values()) == budget
    assert_in_clamps(zeros, sizes, sparsity)


@given(
    st.lists(st.tuples(st.integers(1, 5000), st.none() | sparsities), min_size=1, max_size=8),
    sparsities,
)
@settings(deadline=None, max_examples=100)
def test_explicit_layers_get_what_is_said_the_rest_meets_the_budget_or_it_is_an_error(
    layers, sparsity
):
    sizes, fixed = named(n for n, _ in layers), named(s for _, s in layers)
    budget = uniform_budget(sizes.values(), sparsity)
    given_zeros = {
        name: math.floor(Fraction(str(s)) * sizes[name])
        for name, s in fixed.items()
        if s is not None
    }
    room = sum(n for name, n in sizes.items() if fixed[name] is None)
    feasible = 0 <= budget - sum(given_zeros.values()) <= room
    if not feasible:
        with pytest.raises(ConfigError, match="the allocation can make between"):
            meet_budget(explicit_curves(fixed), sizes, budget, 0.0, 1.0)
        return
    zeros = meet_budget(explicit_curves(fixed), sizes, budget, 0.0, 1.0)
    assert sum(zeros.values()) == budget
    for name, count in given_zeros.items():
        assert zeros[name] == count
    free = [zeros[name] / n for name, n in sizes.items() if fixed[name] is None]
    small = min((n for name, n in sizes.items() if fixed[name] is None), default=1)
    assert max(free, default=0) - min(free, default=0) <= len(sizes) / small


def test_a_decimal_sparsity_counts_as_it_is_written():
    # 0.29 * 100 < 29 in binary floating point.
    zeros = meet_budget(explicit_curves({"a": 0.29, "b": None}), {"a": 100, "b": 100}, 60, 0.0, 1.0)
    assert zeros == {"a": 29, "b": 31}


def test_an_explicit_allocation_that_cannot_work_names_the_sparsities_that_would():
    fixed = {"a": 0.9, "b": 0.1, "c": None}
    with pytest.raises(ConfigError) as caught:
        meet_budget(explicit_curves(fixed), {"a": 100, "b": 100, "c": 50}, 20, 0.0, 1.0)
    message = str(caught.value)
    assert "between 0.4 and 0.6 of the weights" in message
    assert "asks for 0.08" in message
    assert "name fewer layers" in message


def test_owl_gives_less_to_blocks_with_more_outliers_as_its_formula_says():
    outliers = {"a": 0.01, "b": 0.03, "c": 0.02, "d": 0.01}
    sizes = {"a": 1000, "b": 3000, "c": 2000, "d": 500}
    zeros = meet_budget(owl_curves(outliers, 0.6), sizes, 3900, LOWEST, HIGHEST)
    # Yin et al.: shares scaled to a span of 2 * 0.08, sparsities 1 - share, and one shift for all.
    scaled = {name: (d - 0.01) / 0.02 * 0.16 for name, d in outliers.items()}
    shift = (3900 + sum(scaled[n] * sizes[n] for n in sizes)) / sum(sizes.values())
    for name, n in sizes.items():
        assert zeros[name] == pytest.approx((shift - scaled[name]) * n, abs=len(sizes))
    assert zeros["b"] / 3000 == pytest.approx(zeros["a"] / 1000 - 0.16, abs=0.005)


def test_owl_of_equal_blocks_is_uniform():
    sizes = {"a": 100, "b": 300}
    zeros = meet_budget(owl_curves({"a": 0.2, "b": 0.2}, 0.37), sizes, 148, LOWEST, HIGHEST)
    assert zeros == {"a": 37, "b": 111}


def test_fisher_removes_what_costs_least_over_all_layers():
    generator = torch.Generator().manual_seed(4)
    sparsity, costs, logs, sizes = 0.5, {}, {}, {}
    for i, scale in enumerate([0.8, 1.0, 1.25, 40.0]):
        weight = scale * torch.randn(30, 40, generator=generator)
        outputs = 0.5 + torch.rand(30, generator=generator)
        inverse = 0.5 + torch.rand(40, generator=generator)
        name = f"layer{i}"
        costs[name], sizes[name] = cost_quantiles(weight, outputs, inverse), weight.numel()
        logs[name] = sorted(
            math.log(float(outputs[r]) * float(weight[r, c]) ** 2 / float(inverse[c]))
            for r in range(30)
            for c in range(40)
        )
    budget = 2400
    zeros = meet_budget(fisher_curves(costs, sparsity), sizes, budget, LOWEST, HIGHEST)
    low, high = (round(1200 * limit) for limit in limits(sparsity))

    def removed(t: float) -> dict[str, int]:
        return {n: min(high, max(low, sum(x < t for x in values))) for n, values in logs.items()}

    threshold = next(
        t for t in sorted(x for v in logs.values() for x in v) if sum(removed(t).values()) >= budget
    )
    for name, count in removed(threshold).items():
        assert zeros[name] == pytest.approx(count, abs=5)
    assert zeros["layer3"] == low
    assert zeros["layer0"] > zeros["layer1"] > zeros["layer2"] > zeros["layer3"]


def test_quantiles_run_from_the_cheapest_weight_to_the_dearest():
    weight = torch.tensor([[1.0, 2.0], [0.0, 4.0]])
    found = cost_quantiles(weight, torch.tensor([1.0, 10.0]), torch.tensor([1.0, 2.0]))
    assert found[0] < -80  # a zero costs nothing, and its logarithm is finite
    assert float(found[-1]) == pytest.approx(math.log(10 * 16 / 2))
    assert bool((found.diff() >= 0).all())


def test_outliers_are_counted_against_the_layer_s_mean():
    generator = torch.Generator().manual_seed(0)
    weight, norms = torch.randn(8, 20, generator=generator), torch.rand(20, generator=generator)
    norms[3] = 30  # one large input: weights alone would not show it
    scores = [
        abs(w) * n for row in weight.tolist() for w, n in zip(row, norms.tolist(), strict=True)
    ]
    mean = sum(scores) / len(scores)
    expected = sum(s > 5 * mean for s in scores) / len(scores)
    assert outlier_share(weight, norms) == pytest.approx(expected)
    assert expected > 0


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 10**9))
@settings(deadline=None)
def test_a_count_of_zeros_makes_a_pattern_with_just_as_many(rows, columns, seed):
    zeros = seed % (rows * columns + 1)
    pattern = exactly(zeros, (rows, columns))
    assert isinstance(pattern, Unstructured)
    assert pattern.zeros(rows * columns) == zeros
    assert pattern.column_zeros(rows, 0, columns) == zeros
