"""What every storage format promises behind a pointwise convolution."""

import pytest
import torch
from torch import nn

from hf_sparse.core.patterns import NM
from hf_sparse.formats import FORMATS, Accepted
from hf_sparse.layers.axes import Axes
from hf_sparse.layers.conv import empty_dense_layer, sparse_class

every_format = pytest.mark.parametrize("name", FORMATS)
every_convolution = pytest.mark.parametrize("cls", [nn.Conv1d, nn.Conv2d])


def pair(name: str, cls: type) -> tuple[nn.Module, nn.Module]:
    """A pointwise convolution with 2 of 4 inputs kept, dense and packed."""
    torch.manual_seed(0)
    dense = cls(12, 6, 1)
    with torch.no_grad():
        dense.weight[:, 1::4] = 0
        dense.weight[:, 2::4] = 0
    axes = Axes.of(dense)
    matrix = axes.matrix(dense.weight.detach())
    verdict = FORMATS[name].fits(matrix, NM(2, 4))
    assert isinstance(verdict, Accepted)
    packed = verdict.format.pack(matrix)
    sparse = sparse_class(axes)(
        verdict.format, packed, (6, 12), torch.float32, nn.Parameter(dense.bias.detach()), axes
    )
    return dense, sparse


def inputs(cls: type) -> torch.Tensor:
    return torch.randn(2, 12, *([7] if cls is nn.Conv1d else [3, 5]))


@every_format
@every_convolution
@pytest.mark.parametrize("resolved", [False, True], ids=["stored", "in a kernel"])
def test_it_computes_what_the_convolution_does(name, cls, resolved):
    dense, sparse = pair(name, cls)
    if resolved:
        sparse.resolve()
    x = inputs(cls)
    for given in (x, x[0], x.transpose(0, -1).contiguous().transpose(0, -1)):
        found = sparse(given)
        torch.testing.assert_close(found, dense(given))
        assert found.is_contiguous()  # the models' `.view` needs it


@every_format
@every_convolution
def test_it_passes_for_the_convolution_that_it_replaces(name, cls):
    dense, sparse = pair(name, cls)
    assert isinstance(sparse, cls)
    for attribute in ("in_channels", "out_channels", "kernel_size", "stride", "padding"):
        assert getattr(sparse, attribute) == getattr(dense, attribute)
    assert (sparse.groups, sparse.dilation, sparse.transposed) == (1, dense.dilation, False)
    assert torch.equal(sparse.weight, dense.weight)
    assert sparse.matrix.shape == sparse.shape == (6, 12)
    empty = empty_dense_layer(sparse)
    assert type(empty) is cls
    assert empty.weight.shape == dense.weight.shape


@every_format
@every_convolution
def test_its_gradient_reaches_inputs_and_bias(name, cls):
    dense, sparse = pair(name, cls)
    x = inputs(cls)
    given, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    sparse(given).square().sum().backward()
    dense(expected).square().sum().backward()
    torch.testing.assert_close(given.grad, expected.grad)
    torch.testing.assert_close(sparse.bias.grad, dense.bias.grad)
