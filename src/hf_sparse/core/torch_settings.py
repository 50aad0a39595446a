"""torch's global settings, as a run needs them whatever the user's are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from .precision import full_precision


@contextmanager
def own_settings(device: torch.device) -> Iterator[None]:
    """While this lasts, nothing that a user has set for the whole process changes a run.

    - Tensors are ordinary ones, without gradients, also within `torch.inference_mode`.
    - Autocast is off: a model runs in its own dtype, and sums of statistics stay fp32. Products of
      fp32 matrices are fp32, whatever `torch.set_float32_matmul_precision` allows.
    - New tensors are fp32 and, if there is another default device, on that of the model.
    - Compiled models and functions run as they were written, since the run stops within them.
    - `nn.TransformerEncoder` calls its layers, instead of a fused kernel that reads their weights.
    - Where deterministic algorithms were asked for, one that has none warns instead of failing.

    Args:
        device: where the model takes its inputs.
    """
    dtype, fused = torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled()
    strict = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(full_precision())
        for kind in {"cpu", device.type}:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type not in ("cpu", device.type):
            stack.enter_context(device)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fused)
        torch.backends.mha.set_fastpath_enabled(False)
        if strict and not warns:
            stack.callback(torch.use_deterministic_algorithms, True)
            torch.use_deterministic_algorithms(True, warn_only=True)
        yield
