"""What is written into a sparse layer's weight reaches the layer."""

import copy
import warnings

import pytest
import torch
from torch import nn

from hf_sparse import AdapterError, FormatError, SparseLinear, TrainingError
from hf_sparse.core.grids import Grid
from hf_sparse.core.low_rank import LowRank
from hf_sparse.formats import Bitmask, NMPacked, Quantized

WEIGHT = torch.tensor([[0.0, 2, 0, -3], [5, 0, 0, 0.5], [1, 0, -1, 0]])


def layer(weight=WEIGHT, fmt=None, resolve=True, **kwargs):
    fmt = fmt or Bitmask()
    sparse = SparseLinear(fmt, fmt.pack(weight), weight.shape, weight.dtype, **kwargs)
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
    "weight = Parameter": lambda s, new: setattr(s, "weight", nn.Parameter(new)),
    "out=": lambda s, new: torch.add(new, 0, out=s.weight),
    "foreach": lambda s, new: torch._foreach_copy_([s.weight.data], [new]),
    "a keyword": lambda s, new: nn.init.constant_(tensor=s.weight, val=1.5),
    "a second argument": lambda s, new: _copy_into(new, s.weight),
    "aten": lambda s, new: torch.ops.aten.copy_(s.weight, new),
    "an optimiser": lambda s, new: _step(s.weight.detach(), new),
    "index_put": lambda s, new: torch.index_put_(s.weight, (torch.arange(3),), new),
    "inference": lambda s, new: torch.inference_mode()(_copy_into)(new, s.weight.data),
}


def _copy_into(source, target):
    target.copy_(source)


def _step(parameter, new):
    parameter.grad = parameter - new
    torch.optim.SGD([parameter], lr=1.0).step()


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


READS = {
    "out of place": lambda w: w.add(1),
    "names that end like those that write": lambda w: w.is_floating_point() or w.__len__(),
    "out= elsewhere": lambda w: torch.add(w, 1, out=torch.empty(3, 4)),
    "numpy": lambda w: w.numpy().sum(),
    "an argument of a write": lambda w: torch.zeros(3, 4).copy_(w),
}


@pytest.mark.parametrize("way", READS)
def test_what_only_reads_hands_nothing_back(way, monkeypatch):
    taken = []
    monkeypatch.setattr("hf_sparse.layers.linear.take", lambda *args: taken.append(args))
    READS[way](layer().weight)
    assert not taken


@pytest.mark.parametrize("make", [lambda w: w.numpy(), lambda w: w.data.view(-1).numpy()])
def test_an_array_of_it_can_not_be_written_to(make):
    sparse = layer()
    with pytest.raises(ValueError, match="read-only"):
        make(sparse.weight)[...] = 1
    check(sparse, WEIGHT, "bitmask")


@pytest.mark.parametrize(
    "ask",
    [lambda w: w.requires_grad_(True), lambda w: setattr(w, "requires_grad", True)],
)
def test_it_can_not_be_trained_by_itself(ask):
    with pytest.raises(TrainingError, match=r"hf_sparse\.training\.prepare_for_training\(model\)"):
        ask(layer().weight)
    assert torch.equal(layer().weight.detach().requires_grad_(True), WEIGHT)


@pytest.mark.parametrize("value", [None, 1.0, [[0.0]]])
def test_what_is_no_tensor_is_refused(value):
    with pytest.raises(FormatError, match="expected a tensor"):
        layer().weight = value


def test_without_contents_there_is_nothing_to_write_into():
    empty = layer().to("meta")
    nn.init.zeros_(empty.weight)
    with pytest.raises(FormatError, match="a sparse layer that is on meta"):
        empty.weight = WEIGHT
    with pytest.raises(FormatError, match="a weight that was written is on meta"):
        layer().weight = WEIGHT.to("meta")
