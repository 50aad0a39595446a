"""Products by way of decoded blocks."""

import pytest
import torch
import torch.nn.functional as F

from hf_sparse.kernels.cpu import product
from hf_sparse.kernels.cpu import weight as tile_weight
from hf_sparse.kernels.cpu.pack import pack_dense


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(36,), (3, 36), (2, 3, 36), (0, 36)])
def test_products_by_decoded_blocks_agree_with_float64(monkeypatch, x_dtype, shape):
    monkeypatch.setattr(tile_weight, "BLOCK_BYTES", 16 * 36 * 2)  # 53 rows are then several
    weight = F.dropout(normal(53, 36, seed=2), 0.6).bfloat16()
    bias, x = normal(53, seed=1).to(x_dtype), normal(*shape, seed=0).to(x_dtype)
    packed = pack_dense(weight)
    for given in (None, bias):
        y = product.decoded_linear(x, packed, given)
        other = None if given is None else given.double()
        expected = F.linear(x.double(), weight.double(), other)
        assert y.dtype == x_dtype
        tolerance = {torch.bfloat16: 3e-2, torch.float16: 3e-3}.get(x_dtype, 1e-5)
        torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
