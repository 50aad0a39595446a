"""Who watches what torch computes: tracers, compilers, transforms and modes see no numpy."""

from __future__ import annotations

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)


def transformed() -> bool:
    """Is a transform of torch.func, or forward-mode differentiation, at work, and no compiler?"""
    return not torch.compiler.is_compiling() and (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def recording(*tensors: Tensor | None) -> bool:
    """Does a compiler, tracer, transform, mode or subclass see what is computed with tensors?"""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or transformed()
        or not all(each is None or type(each) in _PLAIN for each in tensors)
    )
