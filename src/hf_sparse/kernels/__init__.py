"""How a sparse layer multiplies: the first kernel in the list that accepts a weight takes it.

A new kernel is one file and one line here. The reference path, which unpacks the stored form at
every call, is always there and always valid.
"""

from __future__ import annotations

from ..core.errors import RegistrationError
from ..core.registry import Registry
from .base import Choice, Considered, Form, Kernel, Stored, Verdict
from .cpu.columns.kernel import ColumnKernel
from .cpu.integer.kernel import IntegerKernel
from .cpu.kernel import TileKernel
from .dense import DenseKernel
from .gpu.kernel import SlicedKernel
from .gpu.semi_structured import SemiStructuredKernel

REFERENCE = "reference"

# From the preferred one down.
KERNELS: Registry[Kernel] = Registry(
    "kernel",
    Kernel,  # type: ignore[type-abstract]
    (IntegerKernel, ColumnKernel, TileKernel, SemiStructuredKernel, SlicedKernel, DenseKernel),
    reserved=[REFERENCE],
)

__all__ = [
    "KERNELS",
    "Choice",
    "Considered",
    "Form",
    "Kernel",
    "Stored",
    "Verdict",
    "choose",
    "register_kernel",
]


def register_kernel(cls: type[Kernel], *, before: str | None = None) -> type[Kernel]:
    """Let a kernel of your own multiply the weights that it accepts; a decorator.

    Layers that are made or moved from then on consider it. A kernel is no part of a checkpoint:
    who loads one without it gets another kernel, and the same numbers up to rounding.

    Args:
        cls: derives from `hf_sparse.kernels.Kernel`.
        before: name of the kernel that it is considered before, e.g. "dense"; None: before all.

    Returns:
        The class.

    Raises:
        RegistrationError: it isn't that, lacks a method, or its name is taken.
        ConfigError: no kernel is called `before`.

    Example:
        >>> @hf_sparse.register_kernel
        ... class Mine(Kernel):
        ...     name: ClassVar[str] = "mine"
        ...     ...
    """
    return KERNELS.register(cls, next(iter(KERNELS)) if before is None else before)


def choose(stored: Stored) -> Choice:
    """Resolve the kernel for one layer, with the reasons.

    Raises:
        RegistrationError: a kernel's `consider` doesn't say what came of it.
    """
    trace: list[Verdict] = []
    for cls in KERNELS.values():
        considered = cls.consider(stored)
        if not isinstance(considered, Considered):
            raise RegistrationError(
                f"{cls.__name__}.consider gave {type(considered).__name__}: return a Considered"
            )
        trace.append(considered.verdict)
        if considered.kernel is not None:
            return Choice(considered.kernel, tuple(trace))
    trace.append(Verdict(REFERENCE, True, "unpacks the stored weight at every call"))
    return Choice(None, tuple(trace))
