"""What is written into a sparse layer's weight reaches the layer."""

import copy
import warnings

import pytest
import torch
from torch import nn

from hf_sparse import AdapterError, FormatError, SparseLinear
from hf_sparse.core.grids import Grid
from hf_sparse.core.low_rank import LowRank
from hf_sparse.formats import Bitmask, NMPacked, Quantized, pack_weight

WEIGHT = torch.tensor([[0.0, 2, 0, -3], [5, 0, 0, 0.5], [1, 0, -1, 0]])


def layer(weight=WEIGHT, fmt=None, resolve=True, **kwargs):
    fmt = fmt or Bitmask()
    sparse = SparseLinear(fmt, pack_weight(fmt, weight), weight.shape, weight.dtype, **kwargs)
    if resolve:
        sparse.resolve()
    return sparse


def check(sparse, expected, fmt):
    x = torch.eye(4, dtype=expected.dtype)
    assert torch.equal(sparse.matrix, expected)
    torch.testing.assert_close(sparse(x), expected.T.contiguous())
    assert sparse.format.label == fmt
    assert sparse.format.specs(sparse.shape).keys() == sparse.packed.keys()


def quantized(weight):
    fmt = Quantized(Grid(8, None, True), Bitmask())
    codes = fmt.grid.fit(weight).round(weight)
    return SparseLinear(fmt, fmt.pack(codes), weight.shape, weight.dtype)


WRITES = {
    "data +=": lambda s, new: s.weight.data.__iadd__(new - WEIGHT),
    "data =": lambda s, new: setattr(s.weight, "data", new),
    "weight =": lambda s, new: setattr(s, "weight", new),
    "copy_": lambda s, new: s.weight.copy_(new),
    "detach().copy_": lambda s, new: s.weight.detach().copy_(new),
    "a view": lambda s, new: s.weight.data.view(-1).copy_(new.view(-1)),
    "rows": lambda s, new: [r.copy_(n) for r, n in zip(s.weight.unbind(), new, strict=True)],
    "[...] =": lambda s, new: s.weight.__setitem__(slice(None), new),
    "init": lambda s, new: nn.init.constant_(s.weight.data, 1.5),
}


@pytest.mark.filterwarnings("ignore:A weight that does not fit")
@pytest.mark.parametrize("resolve", [True, False])
@pytest.mark.parametrize("way", WRITES)
def test_what_is_written_is_what_the_layer_computes_with(way, resolve):
    sparse = layer(resolve=resolve)
    new = torch.full((3, 4), 1.5)
    WRITES[way](sparse, new)
    check(sparse, new, "dense")


def test_it_warns_that_the_layer_is_dense_and_says_what_to_call():
    sparse = layer()
    with pytest.warns(UserWarning, match=r"dense now.* call hf_sparse.merge_adapter\(model\)"):
        sparse.weight.data += 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        sparse.weight.data += 1
    check(sparse, WEIGHT + 2, "dense")


def test_a_weight_with_the_same_zeros_stays_packed():
    sparse = layer()
    sparse.weight.data *= 3
    check(sparse, WEIGHT * 3, "bitmask")
    sparse = layer(fmt=NMPacked(2, 4))
    sparse.weight.data *= 3
    check(sparse, WEIGHT * 3, "n:m")


def test_codes_give_way_to_values_with_a_warning():
    sparse = quantized(WEIGHT)
    before = sparse.matrix
    with pytest.warns(UserWarning, match="no longer quantised"):
        sparse.weight.data *= 1.01
    check(sparse, before * 1.01, "bitmask")
    sparse.weight.data = before + 1e-7
    check(sparse, before, "8-bit bitmask")


@pytest.mark.filterwarnings("ignore:A weight that does not fit")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_added_and_taken_away_again_leaves_the_packed_weight_to_the_bit(dtype):
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight *= weight.abs() > 0.7
    delta = torch.randn(20, 30, generator=torch.Generator().manual_seed(1)).to(dtype)
    sparse = layer(weight)
    packed = {key: tensor.clone() for key, tensor in sparse.packed.items()}
    sparse.weight.data += delta
    sparse.weight.data += delta
    assert sparse.format.name == "dense"
    sparse.weight.data -= delta
    sparse.weight.data -= delta
    assert sparse.format.name == "bitmask"
    assert all(torch.equal(sparse.packed[key], tensor) for key, tensor in packed.items())


@pytest.mark.filterwarnings("ignore:A weight that does not fit")
def test_the_low_rank_part_is_in_what_is_written():
    low_rank = LowRank(torch.ones(3, 1), torch.tensor([[1.0, 0, 0, 0]]))
    sparse = layer(low_rank=low_rank)
    whole = sparse.matrix
    sparse.weight.data += 1
    check(sparse, whole + 1, "dense")
    assert sparse.rank == 0
    sparse.weight.data -= 1
    check(sparse, whole, "bitmask")
    assert sparse.rank == 1


def test_it_reads_as_any_tensor():
    sparse = layer()
    weight = sparse.weight
    assert isinstance(weight, torch.Tensor)
    assert torch.equal(weight, WEIGHT)
    assert type(weight + 1) is type(weight @ weight.T) is type(weight.clone()) is torch.Tensor
    assert type(copy.deepcopy(weight)) is torch.Tensor
    assert torch.equal(copy.deepcopy(sparse)(torch.eye(4)), WEIGHT.T)
    weight.requires_grad = False
    weight.data = weight.data
    check(sparse, WEIGHT, "bitmask")


def test_a_parameter_made_of_it_is_an_ordinary_one():
    sparse = layer()
    parameter = nn.Parameter(sparse.weight)
    assert type(parameter) is nn.Parameter
    assert parameter.requires_grad
    with torch.no_grad():
        parameter += 1
    parameter.data = torch.zeros(3, 4)
    check(sparse, WEIGHT, "bitmask")


def test_tensors_computed_from_it_no_longer_belong_to_the_layer():
    sparse = layer()
    (sparse.weight + 0).zero_()
    sparse.weight.clone().zero_()
    sparse.matrix.zero_()
    check(sparse, WEIGHT, "bitmask")


def test_another_shape_is_refused():
    with pytest.raises(FormatError, match=r"shape \(4, 3\), expected \(3, 4\)"):
        layer().weight = torch.zeros(4, 3)


def test_an_offloaded_layer_refuses_what_would_be_lost(monkeypatch):
    sparse = layer()
    monkeypatch.setattr(SparseLinear, "is_offloaded", lambda self: True)
    with pytest.raises(AdapterError, match="load the model without offloading"):
        sparse.weight.data += 1
    check(sparse, WEIGHT, "bitmask")


def test_a_layer_in_training_refuses_another_weight():
    sparse = layer()
    sparse.train_values(torch.float32)
    with pytest.raises(AdapterError, match=r"call hf_sparse\.training\.finish_training"):
        sparse.weight.data += 1
    assert sparse.weight.requires_grad
    sparse.fix_values()
    check(sparse, WEIGHT, "bitmask")
