"""Another layer stands wherever one was used."""

from torch import nn

from hf_sparse.formats.bitmask import Bitmask
from hf_sparse.layers import SparseLinear
from hf_sparse.layers.replace import ModuleParents, pack_linear, replace_module


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))
        self.shared = nn.Linear(8, 8)
        self.again = nn.Sequential(self.shared)
        self.twice = nn.Module()
        self.twice.a = self.twice.b = nn.Linear(8, 8)


def test_a_layer_is_replaced_wherever_it_is():
    model = Model()
    parents = ModuleParents(model)
    untouched = model.second[0]
    for layer in (model.first[0], model.shared, model.twice.a):
        parents.replace(layer, pack_linear(layer, layer.weight.detach(), Bitmask()))
    assert isinstance(model.first[0], SparseLinear)
    assert model.second[0] is untouched
    assert isinstance(model.shared, SparseLinear)
    assert model.again[0] is model.shared
    assert isinstance(model.twice.b, SparseLinear)
    assert model.twice.a is model.twice.b


def test_what_was_put_somewhere_can_be_replaced_in_turn():
    model = Model()
    old, other = model.shared, nn.Linear(8, 8)
    parents = ModuleParents(model)
    parents.put(old, other)
    assert model.shared is model.again[0] is other
    parents.put(other, old)
    assert model.shared is model.again[0] is old


def test_mode_goes_with_it():
    model = Model().eval()
    new = nn.Linear(8, 8)
    replace_module(model, model.shared, new)
    assert model.again[0] is new
    assert not new.training
