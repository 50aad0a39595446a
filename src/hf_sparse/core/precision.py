"""Products of fp32 matrices in fp32, also where the user has allowed less.

`torch.set_float32_matmul_precision("high")` or "medium" lets GPUs multiply in TF32 and CPUs in
bf16: 10 or 7 bits of mantissa, which cost a Hessian its small eigenvalues.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """While this lasts; also a decorator."""
    backends: Any = torch.backends
    products = (backends.cuda.matmul, backends.mkldnn.matmul)
    before = [each.fp32_precision for each in products]
    try:
        for each in products:
            each.fp32_precision = "ieee"
        yield
    finally:
        for each, precision in zip(products, before, strict=True):
            each.fp32_precision = precision
