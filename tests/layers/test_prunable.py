"""What multiplies and can't be pruned says why: above all weights that are made at every call."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from hf_sparse.layers.prunable import is_prunable, multiplies, why_not_prunable
from hf_sparse.layers.select import select_targets


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Scaled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


def parametrized(name: str = "weight") -> nn.Linear:
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, name, Doubled())
    return layer


def masked(name: str = "weight") -> nn.Linear:
    layer = nn.Linear(4, 4)
    prune.l1_unstructured(layer, name, 0.5)
    return layer


def with_own_pair() -> nn.Linear:
    """A weight norm made by hand."""
    layer = nn.Linear(4, 4)
    layer.g = nn.Parameter(torch.ones(4, 1))
    layer.register_forward_pre_hook(lambda m, _: m.weight.data.mul_(m.g))
    return layer


def replaced() -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x
    return layer


OLD_WEIGHT_NORM = "ignore:.*weight_norm.*deprecated"


@pytest.mark.filterwarnings(OLD_WEIGHT_NORM)
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), "remove_parametrizations"),
        (lambda: parametrizations.weight_norm(nn.Conv1d(4, 4, 1)), "remove_parametrizations"),
        (lambda: parametrizations.spectral_norm(nn.Linear(4, 4)), "remove_parametrizations"),
        (lambda: parametrizations.orthogonal(nn.Linear(4, 4)), "remove_parametrizations"),
        (parametrized, "its weight is made by torch.nn.utils.parametrize"),
        (lambda: parametrized("bias"), "its bias is made by torch.nn.utils.parametrize"),
        (lambda: nn.utils.weight_norm(nn.Linear(4, 4)), "remove_weight_norm"),
        (lambda: nn.utils.weight_norm(nn.Conv1d(4, 4, 1)), "remove_weight_norm"),
        (lambda: nn.utils.spectral_norm(nn.Linear(4, 4)), "remove_spectral_norm"),
        (masked, r"prune.remove\(layer, 'weight'\)"),
        (lambda: masked("bias"), r"prune.remove\(layer, 'bias'\)"),
        (with_own_pair, "it holds g, which a sparse layer would lose"),
        (replaced, "its forward was replaced"),
        (lambda: Scaled(4, 4), "Scaled computes in a way of its own"),
        (lambda: nn.MultiheadAttention(4, 2), "multiplies by its weights itself"),
        (lambda: nn.MultiheadAttention(4, 2).out_proj, "MultiheadAttention reads its weight"),
        (lambda: nn.LSTM(4, 4), "LSTM multiplies by its weights itself"),
        (lambda: nn.GRUCell(4, 4), "GRUCell multiplies"),
        (lambda: nn.Bilinear(4, 4, 4), "Bilinear multiplies"),
        (lambda: nn.ConvTranspose1d(4, 4, 1), "ConvTranspose1d, no linear layer"),
        (lambda: nn.Conv1d(4, 4, 3), "a convolution of kernel size 3"),
        (lambda: nn.LazyLinear(4), "isn't initialised"),
        (lambda: nn.Linear(4, 0), "its weight is empty"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_it_is_left_dense_with_the_reason(make, reason):
    layer = make()
    assert multiplies(layer)
    assert not is_prunable(layer)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(why_not_prunable(layer))
    net = nn.ModuleDict({"other": nn.Linear(4, 4), "this": layer})
    selection = select_targets(net, None, None, {})
    assert [target.name for target in selection.targets] == ["other"]
    assert "this" in selection.left_dense


def test_what_its_own_tool_has_folded_is_an_ordinary_layer_again():
    layer, mask = parametrized(), masked()
    parametrize.remove_parametrizations(layer, "weight")
    prune.remove(mask, "weight")
    assert is_prunable(layer)
    assert is_prunable(mask)


@pytest.mark.parametrize("layer", [nn.Embedding(4, 4), nn.LayerNorm(4), nn.ReLU()])
def test_what_does_not_multiply_is_not_listed(layer):
    assert not multiplies(layer)
