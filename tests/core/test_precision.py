"""What is added up and solved does not depend on how precise the user lets products be."""

import pytest
import torch

from hf_sparse.calibration.output_gradients import _Sums
from hf_sparse.calibration.sums import StatisticsCollector
from hf_sparse.core.patterns import Unstructured
from hf_sparse.core.precision import full_precision
from hf_sparse.core.statistics import Needs
from hf_sparse.solvers.layer_solver import LayerSolver
from hf_sparse.solvers.sparsegpt import SparseGPT

CPU = torch.device("cpu")


def settings():
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision


@pytest.fixture
def medium():
    """Products of fp32 may be in TF32 on a GPU and in bf16 on a CPU that has it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield settings()
    torch.set_float32_matmul_precision(before)


def test_the_settings_are_the_users_again_afterwards(medium):
    with full_precision():
        assert settings() == ("ieee", "ieee")
    assert settings() == medium != ("ieee", "ieee")
    with pytest.raises(KeyError), full_precision():
        raise KeyError
    assert settings() == medium


def random_inputs(tokens: int, columns: int) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(0))


def test_sums_are_those_of_fp32(medium):
    inputs = random_inputs(600, 128)
    collector = StatisticsCollector(128, Needs.HESSIAN, 1, CPU, cross=True)
    collector.add(inputs, inputs.flip(0))
    found = collector.finish()
    rows = inputs.double()
    expected = rows.T @ rows / 600
    torch.testing.assert_close(found.hessian.double(), expected, rtol=1e-5, atol=1e-5)
    expected = rows.flip(0).T @ rows / 600
    torch.testing.assert_close(found.cross.double(), expected, rtol=1e-5, atol=1e-5)
    sums = _Sums(128, CPU, torch.Generator())
    sums.add(inputs)
    gram = sums.finish("layer", 600).gram.double()
    torch.testing.assert_close(gram, rows.T @ rows / 600, rtol=1e-5, atol=1e-5)


def test_solving_and_its_error_are_those_of_fp32(medium):
    weight = random_inputs(64, 256)
    collector = StatisticsCollector(256, Needs.HESSIAN, 1, CPU)
    collector.add(random_inputs(900, 256))
    known = collector.finish()
    solver = LayerSolver(SparseGPT(), refit_steps=4, damping=0.01)
    found = solver.solve(weight, known, Unstructured(0.5))
    error = known.relative_error(weight, found.weight)
    torch.set_float32_matmul_precision("highest")
    expected = solver.solve(weight, known, Unstructured(0.5))
    assert torch.equal(found.mask, expected.mask)
    assert torch.equal(found.weight, expected.weight)
    assert error == known.relative_error(weight, found.weight)
