"""`magnitude` against plain loops: the smallest |w| of the whole layer go."""

import math

import pytest
import torch

from hf_sparse.core.patterns import NM, Unstructured
from hf_sparse.core.statistics import Needs
from hf_sparse.solvers.magnitude import Magnitude


def random_weight(shape: tuple[int, int]) -> torch.Tensor:
    # Rows of different sizes: a choice per row would be another one.
    scale = torch.linspace(0.2, 3, shape[0]).unsqueeze(1)
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * scale


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (8, 33), (5, 128)])
@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.9])
def test_the_smallest_weights_of_the_layer_go_and_the_rest_stays_as_it_is(shape, sparsity):
    weight = random_weight(shape)
    values = [(abs(w), i, j) for i, row in enumerate(weight.tolist()) for j, w in enumerate(row)]
    expected = weight.clone()
    for _, i, j in sorted(values)[: round(sparsity * 100) * len(values) // 100]:
        expected[i, j] = 0
    solution = Magnitude().solve(weight, None, Unstructured(sparsity))
    assert torch.equal(solution.weight, expected)
    assert torch.equal(solution.mask, expected != 0)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 5)])
@pytest.mark.parametrize("shape", [(3, 16), (4, 21), (2, 3)])
def test_each_group_loses_its_smallest_weights(shape, n, m):
    weight = random_weight(shape)
    expected = weight.clone()
    for i, row in enumerate(weight.tolist()):
        for start in range(0, len(row), m):
            group = [(abs(w), start + j) for j, w in enumerate(row[start : start + m])]
            for _, j in sorted(group)[: len(group) - math.ceil(n * len(group) / m)]:
                expected[i, j] = 0
    assert torch.equal(Magnitude().solve(weight, None, NM(n, m)).weight, expected)


def test_equal_magnitudes_are_removed_from_the_front_until_the_count_is_right():
    weight = torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, 2.0]])
    solution = Magnitude().solve(weight, None, Unstructured(0.5))
    assert solution.mask.tolist() == [[False, False, False], [True, True, True]]


def test_magnitude_needs_no_data():
    assert Magnitude.needs is Needs.NOTHING
