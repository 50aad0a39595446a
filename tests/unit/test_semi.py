"""2:4 through torch's semi-structured tensors: whom they suit, and that they hold our weights."""

import pytest
import torch
from torch.sparse import (
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from hf_sparse.formats import Bitmask
from hf_sparse.formats.nm import NMPacked
from hf_sparse.kernels import Stored, semi
from hf_sparse.patterns import NM

BOTH = [SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS]


def stored(fmt, dtype=torch.bfloat16, layer_dtype=None, shape=(32, 64)):
    weight = torch.randn(shape)
    weight = (weight * NM(2, 4).mask(weight.abs())).to(dtype)
    return Stored(fmt, fmt.pack(weight), shape, layer_dtype or dtype)


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (stored(Bitmask()), "2:4"),
        (stored(NMPacked(4, 8)), "2:4"),
        (stored(NMPacked(2, 4), torch.float32), "fp16 and bf16"),
        (stored(NMPacked(2, 4), layer_dtype=torch.float32), "fp16 and bf16"),
    ],
)
def test_other_weights_are_left_to_other_kernels(weight, reason):
    assert reason in semi.obstacle(weight)
    assert semi.SemiStructuredKernel.consider(weight).kernel is None


def test_the_device_is_named_when_it_is_the_obstacle():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "NVIDIA" in semi.obstacle(stored(NMPacked(2, 4)))


@pytest.mark.parametrize(
    ("shape", "fits"),
    [((32, 64), (True, True)), ((16, 16), (True, False)), ((48, 64), (True, False)),
     ((8, 64), (False, False)), ((32, 40), (False, False)), ((4096, 14336), (True, True))],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shapes_follow_the_rules_of_the_backend(shape, fits, dtype):
    found = tuple(semi.misfit(shape, dtype, backend) is None for backend in BOTH)
    assert found == fits


def test_our_2_4_weights_survive_torch_s_form_and_take_0_5625_of_the_bytes():
    weight = stored(NMPacked(2, 4), shape=(64, 128))
    dense = weight.dense(torch.bfloat16)
    values, meta = sparse_semi_structured_from_dense_cutlass(dense)
    assert values.nbytes + meta.nbytes == 0.5625 * dense.nbytes
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, meta), dense)


def test_tensors_of_no_layer_are_refused():
    with pytest.raises(ValueError, match="belong to no 2:4 layer"):
        semi.semi_linear(torch.randn(2, 64), torch.randn(32, 32), None, 32, 64)
