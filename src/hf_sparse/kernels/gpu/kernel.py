"""`sliced`: sparse products on NVIDIA GPUs, as a kernel of a layer and as a torch operator."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ...core.grids import Grid, QuantizedWeight, Scales
from ...formats import Format, Quantized
from ...formats.base import Packed
from ..base import Considered, Stored, Verdict
from ..codes import more_than_8_bits
from ..operator import define_product
from ..packed_kernel import PackedKernel
from ..token_classes import fastest, in_words
from . import timing, triton_works
from .check import checked
from .pack import pack_dense
from .product import CLASSES, WAYS, Product
from .room import dense_cost
from .unpack import codes, dense, row_scales
from .weight import FLOATS, MOST_ROWS, TENSORS


def _check(*operands: Any) -> Product:
    *tensors, numbers = operands
    return Product(checked(numbers, tensors))


def _shape(*operands: Any) -> tuple[int, int]:
    *_, numbers = operands
    if len(numbers) < 2:
        raise ValueError(f"numbers are {numbers}, expected those of `SlicedWeight.numbers`")
    return numbers[0], numbers[1]


class SlicedKernel(PackedKernel[Product]):
    """Sparse products on NVIDIA GPUs for values in fp32, bf16, fp16, and codes of up to 8 bits."""

    name: ClassVar[str] = "sliced"
    # x W' for a weight in the sliced layout, in x's dtype; `numbers` are `SlicedWeight.numbers()`.
    operators, alive = define_product(
        "sliced_linear",
        "Tensor values, Tensor gaps, Tensor anchors, Tensor slices, Tensor order, Tensor? scales, "
        "int[] numbers",
        shape=_shape,
        check=_check,
        product=lambda x, product: product(x),
        transposed=lambda x, product: product.transposed(x),
    )

    @classmethod
    def take(cls, stored: Stored) -> Considered:
        kernel = cls.of(stored)
        sparse = kernel.product.weight
        weight = dense(sparse, stored.dtype)
        speedups = timing.over_dense(weight, sparse, WAYS, CLASSES, kernel._label())
        ways = fastest(speedups, CLASSES)
        speedup = ways[0].speedup
        reason = in_words(ways)
        if speedup is not None and speedup < 1 and stored.form != "packed":
            cost = dense_cost(stored)
            if cost is None:
                return cls.refuse(reason, speedup)
            reason = f"slower than dense, stays packed: {cost}; {reason}"
        kernel = cls(Product(sparse, ways), kernel._zeros)
        return Considered(Verdict(cls.name, True, reason, speedup, ways), kernel)

    @classmethod
    def of(cls, stored: Stored) -> SlicedKernel:
        """The kernel of a weight, whatever the device, with nothing measured.

        Raises:
            ValueError: its codes take more than 8 bits.
        """
        zeros = stored.tensors.get("weight_zeros")
        if isinstance(stored.format, Quantized):
            coded = stored.format.quantized(stored.tensors, stored.shape)
            if (reason := more_than_8_bits(coded.codes)) is not None:
                raise ValueError(f"{cls.name} {reason}")
            width = coded.scales.grid.width(stored.shape[1])
            weight = pack_dense(coded.codes.to(torch.int8), coded.scales.scale, width)
            return cls(Product(weight), zeros)
        return cls(Product(pack_dense(stored.dense(stored.values_dtype))), zeros)

    @staticmethod
    def obstacle(stored: Stored) -> str | None:
        if stored.device.type != "cuda" or torch.version.cuda is None:
            return f"runs on NVIDIA GPUs, the weight is on {stored.device}"
        if (reason := triton_works.obstacle(stored.device)) is not None:
            return reason
        if isinstance(stored.format, Quantized):
            coded = stored.format.quantized(stored.tensors, stored.shape)
            if (reason := more_than_8_bits(coded.codes)) is not None:
                return reason
        elif stored.values_dtype not in FLOATS:
            return f"has no kernel for values in {stored.values_dtype}"
        if stored.shape[0] * stored.shape[1] >= 1 << 31 or stored.shape[0] > MOST_ROWS:
            return f"takes fewer than {1 << 31} weights in at most {MOST_ROWS} rows"
        return None

    def _label(self) -> str:
        """What its times depend on, beside shape and sparsity."""
        size = self.product.weight.group_size
        return f"sliced {self.product.weight.dtype}" + (f" in groups of {size}" if size else "")

    def tensors(self) -> dict[str, Tensor]:
        tensors = {f"sliced_{name}": t for name, t in self.product.weight.tensors().items()}
        return tensors if self._zeros is None else {**tensors, "sliced_zeros": self._zeros}

    def operands(self) -> tuple[Any, ...]:
        tensors = (getattr(self.product.weight, name) for name in TENSORS)
        return *tensors, list(self.product.weight.numbers())

    def weight(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        return dense(self.product.weight, dtype)

    def packed(self, fmt: Format, dtype: torch.dtype) -> Packed:
        if fmt.grid is not None:
            return fmt.pack(self._codes(fmt.grid))
        return fmt.pack(codes(self.product.weight).to(dtype))

    def _codes(self, grid: Grid) -> QuantizedWeight:
        """The codes and scales that the weight was made of."""
        zero = None if self._zeros is None else self._zeros.to(torch.int16)
        scales = Scales(grid, row_scales(self.product.weight), zero)
        return QuantizedWeight(codes(self.product.weight).to(torch.int16), scales)
