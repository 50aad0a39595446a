"""What the native library's kernels share: what they take, and what it costs here."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable
from typing import Generic

import torch
from jaxtyping import Float
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from ...core.grids import QuantizedWeight
from ...core.logging import get_logger
from ...formats import Quantized
from ..base import Considered, Stored, Verdict
from ..codes import more_than_8_bits
from ..operator import AliveWeights, define_product
from ..packed_kernel import PackedKernel
from ..token_classes import fastest, in_words, over
from . import library, speed
from .product import Product, W, classes_of

logger = get_logger(__name__)


def native_operators(
    name: str, operands: str, shape_at: int, check: Callable[..., Product[W]]
) -> tuple[tuple[CustomOpDef, CustomOpDef], AliveWeights[Product[W]]]:
    """`hf_sparse::name` and its gradient, in x's dtype; see `define_product`.

    Args:
        shape_at: where out_features and in_features stand among the operands.
    """
    return define_product(
        name,
        operands,
        shape=lambda *weight: weight[shape_at : shape_at + 2],
        check=check,
        product=lambda x, product: product(x),
        transposed=lambda x, product: x @ product.weight.dense(x.dtype),
    )


class NativeKernel(PackedKernel[Product[W]], Generic[W]):
    """Products on the CPU of a weight in one of the native library's layouts."""

    @classmethod
    def take(cls, stored: Stored) -> Considered:
        codes = None
        if isinstance(stored.format, Quantized):
            codes = stored.format.quantized(stored.tensors, stored.shape)
            if (reason := more_than_8_bits(codes.codes)) is not None:
                return cls.refuse(reason)
        weight = cls._pack(stored, codes)
        classes, seconds = classes_of(weight), speed.estimate(weight, stored.dtype)
        ways = fastest({name: over(times) for name, times in seconds.items()}, classes)
        reason = f"{cls._path()}, {in_words(ways)}"
        one = seconds.get(classes[0].name, {}).get(ways[0].name)
        verdict = Verdict(cls.name, True, reason, ways[0].speedup, ways, one)
        return Considered(verdict, cls(Product(weight, ways), stored.tensors.get("weight_zeros")))

    @classmethod
    def obstacle(cls, stored: Stored) -> str | None:
        if stored.form == "dense":
            return "a dense weight is preferred"
        if stored.device.type != "cpu":
            return f"runs on CPUs, the weight is on {stored.device}"
        if (reason := cls._unfit(stored)) is not None:
            return reason
        if stored.dtype not in library.FLOATS:
            return f"has no kernel for inputs in {stored.dtype}"
        if max(stored.shape) > library.MAX_DIM:
            return f"takes at most {library.MAX_DIM} rows and columns"
        if (reason := library.unavailable_reason()) is not None:
            _warn_once(reason)
        return reason

    @classmethod
    @abstractmethod
    def _unfit(cls, stored: Stored) -> str | None:
        """What the layout can't hold."""

    @classmethod
    @abstractmethod
    def _pack(cls, stored: Stored, codes: QuantizedWeight | None) -> W:
        """The weight in the layout; codes, where it has some, of up to 8 bits."""

    @classmethod
    @abstractmethod
    def _path(cls) -> str:
        """The instructions that are used, in a few words."""

    def tensors(self) -> dict[str, Tensor]:
        weight = self.product.weight
        tensors = {f"{weight.layout}_{name}": tensor for name, tensor in weight.tensors.items()}
        return tensors if self._zeros is None else {**tensors, "native_zeros": self._zeros}

    def _straight(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.product(x, bias)  # which is added in fp32, too

    def weight(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        return self.product.weight.dense(dtype)

    def _zero_points(self) -> Tensor | None:
        """As codes are packed with them; None if the grid has none."""
        return None if self._zeros is None else self._zeros.to(torch.int16)


@functools.cache
def _warn_once(reason: str) -> None:
    logger.warning("sparse layers are decoded to dense, the saving is on disk only: %s", reason)
