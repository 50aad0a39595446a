"""SparseGPT's Triton kernel against the loop in torch: under the interpreter, or on a GPU."""

import pytest
import torch
from test_sparsegpt import Oracle

from hf_sparse.core.patterns import NM, Unstructured
from hf_sparse.core.statistics import Statistics
from hf_sparse.solvers import sparsegpt
from hf_sparse.solvers.sparsegpt import SparseGPT

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")


def problem(rows, columns, dead=()):
    generator = torch.Generator().manual_seed(rows + columns)
    inputs = torch.randn(3 * columns, columns, generator=generator, dtype=torch.float64)
    inputs[:, list(dead)] = 0
    hessian = (inputs.T @ inputs / len(inputs)).float()
    return torch.randn(rows, columns, generator=generator), hessian


def solve(weight, hessian, pattern, block):
    statistics = Statistics(1, weight.to(DEVICE), hessian=hessian.to(DEVICE))
    solution = SparseGPT(block_size=block).solve(weight.to(DEVICE), statistics, pattern)
    return solution.weight.cpu(), solution.mask.cpu()


@pytest.mark.parametrize(
    ("pattern", "shape", "block"),
    [
        ("0.5", (5, 17), 8),
        ("0.7", (33, 20), 128),
        ((2, 4), (9, 18), 8),
        ((4, 8), (35, 20), 16),
        ((3, 5), (4, 13), 6),
    ],
)
def test_the_kernel_does_what_the_published_algorithm_does(monkeypatch, pattern, shape, block):
    monkeypatch.setattr(sparsegpt, "_fits_kernel", lambda weights: True)
    weight, hessian = problem(*shape, dead=(2, 3))
    if isinstance(pattern, str):
        ours, reach = Unstructured(float(pattern)), block
    else:
        ours, reach = NM(*pattern), -(-block // pattern[1]) * pattern[1]
    expected = Oracle(weight, hessian).run(pattern, reach)
    assert expected.margin > 1e-5  # no tie that rounding could turn
    found, mask = solve(weight, hessian, ours, block)
    assert torch.equal(mask, expected.mask)
    torch.testing.assert_close(found.double(), expected.weight, rtol=1e-4, atol=1e-5)


def test_equal_scores_lose_their_first_weights_as_in_torch(monkeypatch):
    weight, hessian = torch.ones(3, 8), torch.eye(8)
    expected = solve(weight, hessian, NM(2, 4), 8)
    monkeypatch.setattr(sparsegpt, "_fits_kernel", lambda weights: True)
    found = solve(weight, hessian, NM(2, 4), 8)
    assert torch.equal(found[1], expected[1])
    assert found[1].sum() == 12


def test_on_a_cpu_the_loop_stays_in_torch():
    assert not sparsegpt._fits_kernel(torch.zeros(8, 4))
