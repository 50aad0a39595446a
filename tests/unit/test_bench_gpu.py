"""What of `bench gpu` a CPU can run: the loop it compares with, its tables, and its refusal."""

import json

import pytest
import torch

from hf_sparse.bench import gpu
from hf_sparse.patterns import NM, Unstructured


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)])
def test_the_loop_over_columns_prunes_as_well_as_the_solver(pattern):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(900, 256, generator=generator)
    hessian = inputs.T @ inputs / len(inputs)
    weight = torch.randn(24, 256, generator=generator)
    ours, loop = (solve(weight, hessian, pattern) for solve in (gpu._ours, gpu._torch_loop))
    errors = [float((((w - weight) @ hessian) * (w - weight)).sum()) for w in (ours, loop)]
    assert errors[1] == pytest.approx(errors[0], rel=0.01)
    assert (loop == 0).float().mean() == pytest.approx(0.5, abs=0.01)


def test_without_a_gpu_it_says_that_it_needs_one():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match="CUDA GPU"):
        gpu.measure(("decode",), 1)


def test_the_table_has_a_row_for_each_product(tmp_path):
    point = gpu.ProductPoint("direct", (8, 16), 0.5, 1, 1e-6, 2e-6, 2.0, 0.6, 0.7, 1e-3)
    found = {"machine": "GPU", "copy_bandwidth": 4e12, "decode": [vars(point)], "solve": [{"a": 1}]}
    text = gpu.write(tmp_path, found)
    assert "| direct | 8x16 | 50% | 1 | 1.0 | 2.0 | 2.00 | 0.600 | 0.70 |" in text
    assert "4.00 TB/s" in text
    assert json.loads((tmp_path / "gpu.json").read_text())["solve"] == [{"a": 1}]
