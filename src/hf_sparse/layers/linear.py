"""`SparseLinear`: an `nn.Linear` that holds what is left of its weight, and a low-rank part."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..core.input_threshold import InputThreshold
from ..core.low_rank import LowRank
from ..core.model_argument import require_model
from ..formats import Format
from ..formats.base import Packed
from ..kernels.forked import check_threads
from .axes import Axes
from .held import PackedWeight
from .packed_module import PackedModule
from .written_weight import UnpackedWeight, take


class SparseLinear(PackedModule, nn.Linear):
    """A linear layer whose weight is packed; takes the place of a `Linear` or a `Conv1D`.

    It is an `nn.Linear` so that PEFT and whatever else asks `isinstance(layer, nn.Linear)` treats
    it as one. `.weight` can be read, at the price of unpacking it. A weight that is written into
    it, as PEFT's own merging does, is held in the same layout if it is 0 where the old one is, and
    else dense, with a warning; writing the old one back, up to rounding, packs it again.

    Args:
        fmt: storage format of the packed tensors.
        packed: the format's tensors, `weight` and companions; meta tensors before loading.
        shape: (out_features, in_features).
        dtype: dtype of `.weight` and of the product's weight. The stored values may be narrower:
            a bf16 checkpoint loaded in fp32 keeps bf16 values, which is exact. Codes and scales of
            a quantised weight are as stored whatever the dtype.
        bias: bias parameter to adopt, shape (out_features,), or None.
        axes: those of the layer that it replaces; a `Conv1D` keeps its weight as (in, out).
        low_rank: B and A beside the packed weight S, for y = x (S + B A)' + b, or None.
        threshold: up to where inputs count as 0, in training and in every product; None: all count.

    Attributes:
        kernel: what multiplies; None for the reference path.
        trace: which kernels were considered, and what came of it.
    """

    def __init__(
        self,
        fmt: Format,
        packed: Packed,
        shape: tuple[int, int],
        dtype: torch.dtype,
        bias: nn.Parameter | None = None,
        axes: Axes = Axes(),  # noqa: B008 - it is frozen
        low_rank: LowRank | None = None,
        threshold: InputThreshold | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.shape = self.out_features, self.in_features = shape
        self.axes = axes
        self.weight_dtype = dtype
        self.bias, self.threshold = bias, threshold  # type: ignore[assignment]
        self.hold(PackedWeight(fmt, packed, low_rank))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dense weight, unpacked anew at each access; the low-rank part is in it. Of shape
        (out, in), also in place of a `Conv1D`; a convolution's has its axes of size 1 behind.
        What is written into it, or assigned, becomes the layer's."""
        if torch.compiler.is_compiling():
            return self.matrix.view(self.weight_shape)
        with torch.inference_mode(False):  # whose tensors don't tell that they were written to
            weight = self.matrix.view(self.weight_shape)
        return UnpackedWeight.of(weight, partial(take, self))

    @weight.setter
    def weight(self, value: Tensor) -> None:
        take(self, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in `nn.Module`; of `layer.weight = nn.Parameter(...)` the values are taken over."""
        if name == "weight":
            take(self, param)
        else:
            super().register_parameter(name, param)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """That of `weight`."""
        return self.shape if self.axes.transposed else self.axes.own_shape(self.shape)

    @property
    def matrix(self) -> Tensor:
        """`weight` as (out, in), a tensor of its own, that no longer belongs to the layer."""
        low_rank = self.low_rank
        return self.sparse_weight if low_rank is None else low_rank.added_to(self.sparse_weight)

    def forward(self, input: Tensor) -> Tensor:
        # Exporting traces or compiles, and asking for it alone takes as long as a small product.
        exports = torch.compiler.is_compiling() or torch._C._is_tracing()
        if exports and torch.onnx.is_in_onnx_export():
            raise ConfigError(
                "ONNX has no operator for a sparse layer: write the model with "
                "hf_sparse.export_dense(model, folder) and export that, or model.dequantize()"
            )
        check_threads()
        if self.threshold is not None:
            input = self.threshold.apply(input)
        output = self._held.linear(self, input)
        low_rank = self.low_rank
        if low_rank is None:
            return output
        factors = low_rank.to(input.dtype)
        return output + F.linear(F.linear(input, factors.a), factors.b)

    def extra_repr(self) -> str:
        parameters = "".join(f", {k}={v}" for k, v in self.format.parameters().items())
        low_rank = f", low_rank={self.rank}" if self.rank else ""
        threshold = f", input_threshold={self.threshold.value:.4g}" if self.threshold else ""
        layout = f"format={self.format.name}{parameters}{low_rank}{threshold}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {layout}, "
            f"kernel={'reference' if self.kernel is None else self.kernel.name}"
        )


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    """The sparse layers of a model, by name."""
    require_model(model)
    return {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear)}
