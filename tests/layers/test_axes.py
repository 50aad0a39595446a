"""Axes of weights and activations: views there and back, for each kind of layer."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_sparse.layers.axes import Axes


@pytest.mark.parametrize(
    ("module", "expected", "own"),
    [
        (nn.Linear(3, 2), Axes(), (2, 3)),
        (Conv1D(2, 3), Axes(transposed=True), (3, 2)),
        (nn.Conv1d(3, 2, 1), Axes(spatial=1), (2, 3, 1)),
        (nn.Conv2d(3, 2, 1), Axes(spatial=2), (2, 3, 1, 1)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_weight_is_shown_as_out_by_in_and_back(module, expected, own):
    axes = Axes.of(module)
    assert axes == expected
    assert axes.own_shape((2, 3)) == tuple(module.weight.shape) == own
    matrix = axes.matrix(module.weight)
    assert matrix.shape == (2, 3)
    assert torch.equal(axes.own(matrix), module.weight)
    assert axes.own(matrix).data_ptr() == module.weight.data_ptr()


def test_channels_are_put_last_and_back():
    x = torch.randn(2, 3, 4, 5)
    last = Axes(spatial=2).channels_last(x)
    assert last.shape == (2, 4, 5, 3)
    assert all(torch.equal(last[b, i, j], x[b, :, i, j]) for b, i, j in [(0, 0, 0), (1, 3, 2)])
    assert torch.equal(Axes(spatial=2).channels_back(last), x)
    assert torch.equal(Axes().channels_last(x), x)
