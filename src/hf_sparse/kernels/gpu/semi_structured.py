"""`2:4`: the sparse matrix units of NVIDIA GPUs, through torch's semi-structured tensors.

The stored tensors stay ours; a layer that reaches a GPU makes torch's own form of them, that of
cuSPARSELt where torch has it, else that of CUTLASS. Both hold the kept values and 2 bits for the
place of each: 0.5625 of the dense bytes in bf16. torch pads the tokens of a product to 8.

Shapes and dtypes are torch's rules: (16, 16) divides (out, in) with cuSPARSELt and (32, 64) with
CUTLASS, in fp16 or bf16. Codes of a grid are left to the other kernels: their scales lie between
the columns that one matrix instruction adds up.

Taken if it isn't slower than dense, neither at one token nor at many; reports from Hopper differ.
Training goes through it to x: torch can't multiply with the transposed form, so the backward pass
decodes the weight for the call.
"""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)

from ...formats import Format
from ...formats.base import Packed
from ...formats.n_of_m import NMPacked
from ..base import Considered, Stored, Verdict
from ..operator import check_input, define_product
from ..packed_kernel import PackedKernel
from ..token_classes import TokenClass, fastest, in_words
from . import timing

HALVES = (torch.bfloat16, torch.float16)
OLDEST = (8, 0)  # compute capability with sparse matrix units; torch's CUTLASS takes 8.x only
DECODED_COLUMNS = 1024  # at once
_WAY = "semi-structured"
CLASSES = (
    TokenClass("1", 1, 1, (_WAY,)),
    TokenClass("2-127", 127, 16, (_WAY,)),
    TokenClass("128+", None, 2048, (_WAY,)),
)


class SemiStructuredWeight:
    """A 2:4 weight in torch's form, of one backend.

    Attributes:
        tensor: a subclass of Tensor, which only products see: torch.compile is given what it holds.
        values, meta: the tensors that it holds; cuSPARSELt's has both in one, `values`.
        shape: (out, in).
    """

    def __init__(self, tensor: SparseSemiStructuredTensor) -> None:
        self.tensor = tensor
        self.values, self.meta = tensor.packed, tensor.meta
        self.shape = (tensor.shape[0], tensor.shape[1])

    @classmethod
    def of(cls, dense: Float[Tensor, "out in"]) -> SemiStructuredWeight:
        with warnings.catch_warnings():  # that torch may change its tensors is our concern
            warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor")
            return cls(_backend().from_dense(dense.contiguous()))

    def __deepcopy__(self, memo: dict[int, Any]) -> SemiStructuredWeight:
        names, rest = self.tensor.__tensor_flatten__()
        inner = {name: copy.deepcopy(getattr(self.tensor, name), memo) for name in names}
        tensor: Any = self.tensor.__tensor_unflatten__(inner, rest, None, None)
        return SemiStructuredWeight(tensor)

    @property
    def nbytes(self) -> int:
        """Resident bytes."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """What is resident, by name."""
        found = {"semi_structured_values": self.values, "semi_structured_meta": self.meta}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def copy(self) -> SemiStructuredWeight:
        """The same in memory of its own."""
        return SemiStructuredWeight(self.tensor.clone())  # type: ignore[arg-type]

    def __call__(self, x: Tensor) -> Tensor:
        """x W' for x [..., in]; in the weight's dtype by the matrix units, else decoded."""
        check_input(x, self.shape[1], (self.values,))
        if x.dtype != self.tensor.dtype:
            return F.linear(x, self.dense().to(x.dtype))
        rows = x.reshape(-1, self.shape[1]).contiguous()
        y = x.new_empty(0, self.shape[0])
        if len(rows):
            with torch.autocast(x.device.type, enabled=False):  # torch can't cast its own tensor
                y = F.linear(rows, self.tensor)
        return y.view(*x.shape[:-1], self.shape[0])

    def dense(self) -> Float[Tensor, "out in"]:
        """The dense weight: its product with the unit matrix, which is exact."""
        rows, columns = self.shape
        dense = torch.empty(rows, columns, dtype=self.tensor.dtype, device=self.tensor.device)
        for start in range(0, columns, DECODED_COLUMNS):
            unit = dense.new_zeros(columns, min(DECODED_COLUMNS, columns - start))
            unit.diagonal(-start).fill_(1)
            dense[:, start : start + unit.shape[1]] = torch.mm(self.tensor, unit)
        return dense


def _refuse(*operands: Any) -> SemiStructuredWeight:
    raise ValueError(
        "these tensors belong to no 2:4 layer of this process: torch's compressed form can't "
        "be checked, so it is only made here, from the stored one"
    )


class SemiStructuredKernel(PackedKernel[SemiStructuredWeight]):
    """2:4 products on NVIDIA GPUs for values in fp16 and bf16."""

    name: ClassVar[str] = "2:4"
    # x W' for the 2:4 weight that `values` and `meta` belong to, in x's dtype.
    operators, alive = define_product(
        "semi_structured_linear",
        "Tensor values, Tensor? meta, int out_features, int in_features",
        shape=lambda *weight: weight[2:],
        check=_refuse,
        product=lambda x, weight: weight(x),
        transposed=lambda x, weight: x @ weight.dense().to(x.dtype),
    )

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.product.dense(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> SemiStructuredKernel:
        return SemiStructuredKernel(copy.deepcopy(self.product, memo))

    @classmethod
    def take(cls, stored: Stored) -> Considered:
        dense = stored.dense(stored.dtype)
        try:
            weight = SemiStructuredWeight.of(dense)
            weight(dense[:1])
        except RuntimeError as error:  # cuSPARSELt knows its GPUs, and no other way to ask for them
            refused = f"torch refuses: {str(error).strip().splitlines()[0]}"
            return cls.refuse(refused)
        ways = {_WAY: _multiply}
        speedups = timing.over_dense(dense, weight, ways, CLASSES, f"2:4 {_backend().BACKEND}")
        found = fastest(speedups, CLASSES)
        speedup = found[0].speedup
        if any((found[i].speedup or 1) < 1 for i in (0, -1)):
            return cls.refuse(in_words(found), speedup)
        reason = f"{_backend().BACKEND}, {in_words(found)}"
        return Considered(Verdict(cls.name, True, reason, speedup, found), cls(weight))

    @staticmethod
    def obstacle(stored: Stored) -> str | None:
        fmt = stored.format
        if not isinstance(fmt, NMPacked) or (fmt.n, fmt.m) != (2, 4):
            return "takes weights stored as 2:4"
        if stored.dtype not in HALVES or stored.values_dtype != stored.dtype:
            return (
                f"takes fp16 and bf16, this is {stored.values_dtype} in a layer of {stored.dtype}"
            )
        if stored.device.type != "cuda" or torch.version.cuda is None:
            return f"runs on NVIDIA GPUs, the weight is on {stored.device}"
        capability, backend = torch.cuda.get_device_capability(stored.device), _backend()
        if capability < OLDEST:
            return f"{torch.cuda.get_device_name(stored.device)} has no sparse matrix units"
        if backend is SparseSemiStructuredTensorCUTLASS and capability[0] != OLDEST[0]:
            return f"this torch has no cuSPARSELt, and its CUTLASS takes no {capability[0]}.x GPUs"
        return misfit(stored.shape, stored.dtype, backend)

    def tensors(self) -> dict[str, Tensor]:
        return self.product.tensors()

    def operands(self) -> tuple[Any, ...]:
        weight = self.product
        return weight.values, weight.meta, *weight.shape

    def weight(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        return self.product.dense().to(dtype)

    def packed(self, fmt: Format, dtype: torch.dtype) -> Packed:
        return fmt.pack(self.weight(dtype))


def _multiply(x: Tensor, weight: SemiStructuredWeight) -> Tensor:
    return weight(x)


def misfit(
    shape: tuple[int, int], dtype: torch.dtype, backend: type[SparseSemiStructuredTensor]
) -> str | None:
    """Which of a backend's rules for (out, in) weights is broken; None if none is."""
    rule = backend._DTYPE_SHAPE_CONSTRAINTS[dtype]
    rows, columns = rule.sparse_min_rows, rule.sparse_min_cols
    if shape[0] % rows or shape[1] % columns:
        return f"{backend.BACKEND} takes multiples of {rows}x{columns}"
    return None


@functools.cache
def _backend() -> type[SparseSemiStructuredTensor]:
    if torch.backends.cusparselt.is_available():
        return SparseSemiStructuredTensorCUSPARSELT
    return SparseSemiStructuredTensorCUTLASS


def _again(dense: Tensor) -> SemiStructuredKernel:
    return SemiStructuredKernel(SemiStructuredWeight.of(dense))
