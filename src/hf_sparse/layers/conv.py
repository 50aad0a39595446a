"""Sparse pointwise convolutions: linear layers over the channels of each position.

They are `SparseLinear`s, whose storage and kernels they use, and stay what they replace, an
`nn.Conv1d` or `nn.Conv2d`, for whatever asks for that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .axes import Axes
from .linear import SparseLinear


class _SparseConv(SparseLinear):
    """A convolution of kernel size and stride 1, without padding or groups.

    Args: as for `SparseLinear`; the axes say how many positions have.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        spatial = self.axes.spatial
        self.in_channels, self.out_channels, self.groups = self.in_features, self.out_features, 1
        self.kernel_size = self.stride = self.dilation = (1,) * spatial
        self.padding = self.output_padding = (0,) * spatial
        self.padding_mode, self.transposed = "zeros", False

    def forward(self, input: Tensor) -> Tensor:
        """Inputs and outputs (batch, channels, *positions) or (channels, *positions)."""
        outputs = super().forward(self.axes.channels_last(input).contiguous())
        return self.axes.channels_back(outputs).contiguous()


class SparseConv1d(_SparseConv, nn.Conv1d):  # type: ignore[misc,override]
    """An `nn.Conv1d` of kernel size 1 whose weight is packed; `.weight` is (out, in, 1)."""


class SparseConv2d(_SparseConv, nn.Conv2d):  # type: ignore[misc,override]
    """An `nn.Conv2d` of kernel size 1 whose weight is packed; `.weight` is (out, in, 1, 1)."""


def sparse_class(axes: Axes) -> type[SparseLinear]:
    """The class of sparse layers that replace those with such axes."""
    return {0: SparseLinear, 1: SparseConv1d, 2: SparseConv2d}[axes.spatial]


def empty_dense_layer(sparse: SparseLinear) -> nn.Linear | nn.Conv1d | nn.Conv2d:
    """An empty layer on meta like the one that a sparse layer replaced, unless it is transposed."""
    sizes: tuple[int, int] = (sparse.in_features, sparse.out_features)
    bias, spatial = sparse.bias is not None, sparse.axes.spatial
    if not spatial:
        return nn.Linear(*sizes, bias, device="meta")
    return (nn.Conv1d if spatial == 1 else nn.Conv2d)(*sizes, 1, bias=bias, device="meta")


def empty_original_layer(sparse: SparseLinear) -> nn.Module:
    """An empty layer on meta of the kind that a sparse layer replaced, transposed or not."""
    if not sparse.axes.transposed:
        return empty_dense_layer(sparse)
    with torch.device("meta"):
        conv: nn.Module = Conv1D(sparse.out_features, sparse.in_features)
        return conv
