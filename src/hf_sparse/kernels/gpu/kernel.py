"""`sliced`: sparse products on NVIDIA GPUs, as a kernel of a layer and as a torch operator.

`weight` describes the layout, `triton_product` has the kernels. There are two ways: up to some
tokens `direct`, from the packed weight; beyond, `windows`, which decodes some rows at a time into a
matrix of at most 32 MB in bf16 and leaves the product to the library. Which is taken for which
number of tokens is measured.

The operator `hf_sparse::sliced_linear` has a CPU implementation, which decodes the whole weight and
is there to compile, export and test without a GPU. Nothing waits for the device and no shape
depends on data, so that both can be captured in a CUDA graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ...core.grids import Grid, QuantizedWeight, Scales
from ...formats import Format, Quantized, pack_weight
from ...formats.base import Packed
from ..base import Considered, Kernel, Stored, Verdict
from ..token_classes import TokenClass, Way, class_of, fastest
from . import timing, triton_works
from .packer import sliced
from .room import dense_cost
from .weight import FLOATS, LANES, SlicedWeight, same_tensors

MOST_ROWS = 65535 * LANES  # as many slices as CUDA lets the second number of a grid be
CLASSES = (
    TokenClass("1", 1, 1, ("direct",)),
    TokenClass("2-4", 4, 4, ("direct",)),
    TokenClass("5-16", 16, 16, ("direct", "windows")),
    TokenClass("17-127", 127, 64, ("windows", "direct")),
    TokenClass("128+", None, 2048, ("windows",)),
)


@dataclass(frozen=True, eq=False)
class _Product:
    """A weight, and how it is multiplied by the number of tokens."""

    weight: SlicedWeight
    ways: tuple[Way, ...] = fastest({}, CLASSES)

    def __call__(self, x: Tensor) -> Tensor:
        """x W' for x [..., in] on a GPU, in x's dtype."""
        if x.device != self.weight.values.device:
            raise ValueError(
                f"the input is on {x.device}, the sparse weight on {self.weight.values.device}: "
                "move one of them; in place of nn.DataParallel start a process for each GPU"
            )
        rows = x.reshape(-1, x.shape[-1])
        if x.dtype not in FLOATS:
            return F.linear(x, self.weight.dense(x.dtype))
        y = WAYS[self.ways[class_of(len(rows), CLASSES)].name](rows, self.weight)
        return y.view(*x.shape[:-1], self.weight.shape[0])


_alive: weakref.WeakValueDictionary[int, _Product] = weakref.WeakValueDictionary()


class SlicedKernel(Kernel):
    """Sparse products on NVIDIA GPUs for values in fp32, bf16, fp16, and codes of up to 8 bits."""

    name: ClassVar[str] = "sliced"

    def __init__(self, product: _Product, zeros: Tensor | None = None) -> None:
        self._product = product
        # Zero points, which the file needs and the product doesn't: codes are q - z.
        self._zeros = zeros
        _alive[product.weight.order.data_ptr()] = product

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_product"], state["_zeros"])  # type: ignore[misc]

    @property
    def _weight(self) -> SlicedWeight:
        return self._product.weight

    @classmethod
    def consider(cls, stored: Stored) -> Considered:
        reason = cls._obstacle(stored)
        if reason is not None:
            return Considered(Verdict(cls.name, False, reason))
        kernel = cls.of(stored)
        speedups = timing.over_dense(
            kernel._weight.dense(stored.dtype), kernel._weight, WAYS, CLASSES, kernel._label()
        )
        ways = fastest(speedups, CLASSES)
        speedup = ways[0].speedup
        measured = "not measured"
        if speedup is not None:
            measured = "measured over dense: " + "; ".join(map(str, ways))
            if speedup < 1:
                cost = dense_cost(stored)
                if cost is None:
                    return Considered(Verdict(cls.name, False, measured, speedup))
                measured = f"slower than dense, stays packed: {cost}; {measured}"
        kernel = cls(_Product(kernel._weight, ways), kernel._zeros)
        return Considered(Verdict(cls.name, True, measured, speedup, ways), kernel)

    @classmethod
    def of(cls, stored: Stored) -> SlicedKernel:
        """The kernel of a weight, whatever the device, with nothing measured."""
        zeros = stored.tensors.get("weight_zeros")
        if isinstance(stored.format, Quantized):
            codes = stored.format.quantized(stored.tensors, stored.shape)
            scale = codes.scales.scale
            width = codes.scales.grid.width(stored.shape[1])
            return cls(_Product(sliced(codes.codes.to(torch.int8), scale, width)), zeros)
        return cls(_Product(sliced(stored.dense(stored.values_dtype))), zeros)

    @staticmethod
    def _obstacle(stored: Stored) -> str | None:
        if stored.device.type != "cuda" or torch.version.cuda is None:
            return f"runs on NVIDIA GPUs, the weight is on {stored.device}"
        if (reason := triton_works.obstacle(stored.device)) is not None:
            return reason
        if isinstance(stored.format, Quantized):
            codes = stored.format.quantized(stored.tensors, stored.shape).codes
            low, high = (int(code) for code in codes.aminmax())
            if low < -128 or high > 127:
                return f"takes codes of 8 bits with sign, these are {low} to {high}"
        elif stored.values_dtype not in FLOATS:
            return f"has no kernel for values in {stored.values_dtype}"
        if stored.shape[0] * stored.shape[1] >= 1 << 31 or stored.shape[0] > MOST_ROWS:
            return f"takes fewer than {1 << 31} weights in at most {MOST_ROWS} rows"
        return None

    def _label(self) -> str:
        """What its times depend on, beside shape and sparsity."""
        size = self._weight.group_size
        return f"sliced {self._weight.dtype}" + (f" in groups of {size}" if size else "")

    def tensors(self) -> dict[str, Tensor]:
        tensors = {f"sliced_{name}": t for name, t in self._weight.tensors().items()}
        return tensors if self._zeros is None else {**tensors, "sliced_zeros": self._zeros}

    def operands(self) -> tuple[Any, ...]:
        """The weight as the operator `hf_sparse::sliced_linear` takes it, behind x."""
        w = self._weight
        return w.values, w.gaps, w.anchors, w.slices, w.order, w.scales, list(w.numbers())

    def linear(
        self, x: Float[Tensor, "*batch in"], bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "*batch out"]:
        compiling = torch.compiler.is_compiling()
        y: Tensor
        if not compiling and not (torch.is_grad_enabled() and x.requires_grad) and x.is_cuda:
            y = self._product(x)
        else:
            y = sliced_linear(x, *self.operands())
        return y if bias is None else y + bias.to(y.dtype)

    def weight(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        return self._weight.dense(dtype)

    def packed(self, fmt: Format, dtype: torch.dtype) -> Packed:
        if isinstance(fmt, Quantized):
            return fmt.pack(self._codes(fmt.grid))
        return pack_weight(fmt, self._weight.codes().to(dtype))

    def _codes(self, grid: Grid) -> QuantizedWeight:
        """The codes and scales that the weight was made of."""
        zero = None if self._zeros is None else self._zeros.to(torch.int16)
        scales = Scales(grid, self._weight.row_scales(), zero)
        return QuantizedWeight(self._weight.codes().to(torch.int16), scales)


def _triton() -> ModuleType:
    """The Triton kernels: imported where they run, since Triton is no dependency."""
    from . import triton_product

    return triton_product


def _direct(x: Tensor, weight: SlicedWeight) -> Tensor:
    y: Tensor = _triton().product(x, weight)
    return y


def _windows(x: Tensor, weight: SlicedWeight) -> Tensor:
    triton_product = _triton()
    rows, columns = weight.shape
    out = x.new_empty(len(x), rows)
    room = x.new_empty(min(weight.window, rows), columns)
    for first, last in triton_product.windows(weight):
        torch.mm(x, triton_product.panel(weight, first, last, room).T, out=out[:, first:last])
    return out


def _windows_transposed(x: Tensor, weight: SlicedWeight) -> Tensor:
    """x W for x [tokens, out]."""
    triton_product = _triton()
    rows, columns = weight.shape
    out = x.new_zeros(len(x), columns)
    room = x.new_empty(min(weight.window, rows), columns)
    for first, last in triton_product.windows(weight):
        out.addmm_(x[:, first:last], triton_product.panel(weight, first, last, room))
    return out


WAYS = {"direct": _direct, "windows": _windows}


def _find(tensors: tuple[Tensor | None, ...], numbers: Sequence[int]) -> _Product:
    """The weight that tensors belong to; one that is not known is checked first."""
    order = tensors[4]
    assert order is not None
    product = _alive.get(order.data_ptr())
    if (
        product is not None
        and product.weight.numbers() == tuple(numbers)
        and same_tensors(product.weight, tensors)
    ):
        return product
    return _Product(SlicedWeight.of(tuple(numbers), tensors))


_SCHEMA = (
    "(Tensor x, Tensor values, Tensor gaps, Tensor anchors, Tensor slices, Tensor order, "
    "Tensor? scales, int[] numbers) -> Tensor"
)


@torch.library.custom_op("hf_sparse::sliced_linear", mutates_args=(), schema=_SCHEMA)
def sliced_linear(x: Tensor, *weight: Any) -> Tensor:
    """x W' for a weight in the sliced layout, in x's dtype.

    `numbers` are `SlicedWeight.numbers()`: out, in, the dtype's place in `DTYPES`, and so on.
    """
    *tensors, numbers = weight
    return F.linear(x, _find(tuple(tensors), numbers).weight.dense(x.dtype))


@sliced_linear.register_kernel("cuda")
def _(x: Tensor, *weight: Any) -> Tensor:
    *tensors, numbers = weight
    return _find(tuple(tensors), numbers)(x)


@sliced_linear.register_fake
def _(x: Tensor, *weight: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight[-1][0]))


@torch.library.custom_op("hf_sparse::sliced_linear_grad", mutates_args=(), schema=_SCHEMA)
def sliced_linear_grad(x: Tensor, *weight: Any) -> Tensor:
    """x W for x (..., out): takes the gradient of x W' back to its x."""
    *tensors, numbers = weight
    return x @ _find(tuple(tensors), numbers).weight.dense(x.dtype)


@sliced_linear_grad.register_kernel("cuda")
def _(x: Tensor, *weight: Any) -> Tensor:
    *tensors, numbers = weight
    found = _find(tuple(tensors), numbers).weight
    if x.dtype not in FLOATS:
        return x @ found.dense(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    return _windows_transposed(rows, found).view(*x.shape[:-1], found.shape[1])


@sliced_linear_grad.register_fake
def _(x: Tensor, *weight: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight[-1][1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:7])
    ctx.numbers = inputs[7]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = sliced_linear_grad(grad.contiguous(), *ctx.saved_tensors, ctx.numbers)
    return grad_x, *(None for _ in range(7))


sliced_linear.register_autograd(_backward, setup_context=_setup_context)
