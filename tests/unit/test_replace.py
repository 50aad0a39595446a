"""Where a layer is used, and that another one then stands everywhere instead."""

from torch import nn

from hf_sparse.formats.bitmask import Bitmask
from hf_sparse.layers import SparseLinear
from hf_sparse.layers.replace import pack_linear, replace_module, surroundings


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))
        self.shared = nn.Linear(8, 8)
        self.again = nn.Sequential(self.shared)
        self.twice = nn.Module()
        self.twice.a = self.twice.b = nn.Linear(8, 8)


def test_a_module_s_surroundings_are_its_parent_or_all_if_it_has_several():
    model = Model()
    around = surroundings(model)
    assert around[model.first[0]] is model.first
    assert around[model.second] is model
    assert around[model.shared] is model
    assert around[model.twice.a] is model.twice
    assert model not in around


def test_a_layer_is_replaced_wherever_it_is():
    model = Model()
    around = surroundings(model)
    untouched = model.second[0]
    for layer in (model.first[0], model.shared, model.twice.a):
        pack_linear(around[layer], layer, layer.weight.detach(), Bitmask())
    assert isinstance(model.first[0], SparseLinear)
    assert model.second[0] is untouched
    assert isinstance(model.shared, SparseLinear)
    assert model.again[0] is model.shared
    assert isinstance(model.twice.b, SparseLinear)
    assert model.twice.a is model.twice.b


def test_mode_goes_with_it():
    model = Model().eval()
    new = nn.Linear(8, 8)
    replace_module(model, model.shared, new)
    assert model.again[0] is new
    assert not new.training
