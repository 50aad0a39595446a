"""Products of many tokens in fp32, where the processor has no units for 16-bit floats.

There torch takes 5 to 10 times as long for a product in bf16 or fp16 as for one in fp32, since it
takes the numbers apart one by one. Inside `wide_products` weights are widened a few megabytes at a
time, multiplied in fp32 and the sums rounded to the dtype, once, as torch's own product does. So
what holds is the rounding: outputs are the same but where two orders of the same fp32 sum fall on
two sides of a rounding boundary. Whether it pays is measured, once for a machine, not guessed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .. import timing
from ..machine import processor

BLOCK_BYTES = 4 << 20  # of a widened block of a weight
LEAST_TOKENS = 4  # with fewer, reading the weights takes the time
PAYS = 1.5  # times as fast: less is not worth another order of sums
TOKENS, SHAPE = 64, (256, 1024)
HALVES = (torch.bfloat16, torch.float16)


def pays(dtype: torch.dtype) -> bool:
    """Is fp32 clearly faster than a 16-bit dtype here, for many tokens?"""
    return dtype in HALVES and timing.enabled() and _faster(dtype)


@functools.cache  # what could not be measured is not tried at every product
def _faster(dtype: torch.dtype) -> bool:
    key = f"{processor()}, {torch.backends.cpu.get_cpu_capability()}, {dtype} in fp32"
    found = timing.remembered(key, ("wide", "own"), functools.partial(_measure, dtype))
    return found is not None and found["own"] > PAYS * found["wide"]


def _measure(dtype: torch.dtype) -> timing.Measured | None:
    x = torch.randn(TOKENS, SHAPE[1], device="cpu").to(dtype)
    weight = [torch.randn(*SHAPE, device="cpu").to(dtype)]
    return timing.compare(
        {
            "wide": (lambda w: _linear(x, w, None), weight),
            "own": (lambda w: F.linear(x, w), weight),
        }
    )


@contextmanager
def wide_products(*models: torch.nn.Module) -> Iterator[None]:
    """While this lasts, products of many tokens in the models' 16-bit dtypes on the CPU are made in
    fp32 where that is faster here; those in other dtypes, and of few tokens, as ever. Weights on
    the meta device are taken for such as come to the CPU block by block."""
    parameters = itertools.chain.from_iterable(model.parameters() for model in models)
    dtypes = {each.dtype for each in parameters if each.device.type in ("cpu", "meta")}
    wide = frozenset(dtype for dtype in dtypes.intersection(HALVES) if pays(dtype))
    with _WideProducts(wide) if wide else nullcontext():
        yield


class _WideProducts(TorchFunctionMode):
    """Makes products in fp32 whose first operand is in one of some dtypes."""

    def __init__(self, dtypes: frozenset[torch.dtype]) -> None:
        super().__init__()
        self._dtypes = dtypes

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        wide = _WIDE.get(func)
        if wide is not None and not kwargs and len(args) >= 2 and self._takes(args):
            return wide(*args)
        return func(*args, **(kwargs or {}))

    def _takes(self, args: tuple[Any, ...]) -> bool:
        x = args[0]
        return all(
            type(each) in (Tensor, torch.nn.Parameter)
            and each.dtype == x.dtype
            and each.dtype in self._dtypes
            and each.is_cpu
            for each in args
            if each is not None
        ) and (x.dim() >= 2 and x.numel() >= LEAST_TOKENS * x.shape[-1])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    step = max(1, BLOCK_BYTES // max(1, 4 * weight.shape[-1]))
    wide, outputs = x.float(), weight.shape[0] if weight.dim() == 2 else 0
    if outputs <= step:
        return F.linear(wide, weight.float(), None if bias is None else bias.float()).to(x.dtype)
    parts = []
    for rows in (slice(first, first + step) for first in range(0, outputs, step)):
        own = None if bias is None else bias[rows].float()
        parts.append(F.linear(wide, weight[rows].float(), own).to(x.dtype))
    return torch.cat(parts, dim=-1)


def _matmul(x: Tensor, other: Tensor) -> Tensor:
    return torch.matmul(x.float(), other.float()).to(x.dtype)


def _addmm(bias: Tensor, x: Tensor, other: Tensor) -> Tensor:
    return torch.addmm(bias.float(), x.float(), other.float()).to(x.dtype)


_MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.mm)
_WIDE: dict[Any, Callable[..., Tensor]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    **dict.fromkeys((*_MATMULS, Tensor.mm), _matmul),
}
