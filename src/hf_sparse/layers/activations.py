"""May the sparse layers of a model round their inputs?"""

from __future__ import annotations

from torch import nn

from ..core.logging import get_logger
from ..kernels.cpu.integer.kernel import IntegerKernel
from .linear import sparse_layers

logger = get_logger(__name__)


def round_activations(model: nn.Module, to: str | None) -> None:
    """Let the sparse layers' kernels round their inputs to "int8", or None: to nothing.

    A warning says so if no layer has a kernel that does.
    """
    layers = sparse_layers(model).values()
    for layer in layers:
        if to != layer.activations:
            layer.activations, layer.form = to, "any"
            if layer.kernel is not None:
                layer.hold(layer.stored)
                layer.resolve()
    verdicts = [v for layer in layers for v in layer.trace if v.kernel == IntegerKernel.name]
    if to is not None and verdicts and not any(verdict.accepted for verdict in verdicts):
        logger.warning("activations=%r rounds nothing here: %s", to, verdicts[0].reason)
