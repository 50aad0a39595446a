"""The residual stream of a block: which layers write to it, and what it is before each of them.

A block adds its layers' outputs up to its own: y = x + sum of c_l y_l. Nothing is known of names or
classes: which layers these are, and their factors c_l, is found from a run of the block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .block_walk import Visit
from .hooks import hooked
from .passes import Call

# Of the largest output: a residual sum that is reproduced this closely, and to the rounding of the
# model's dtype, is one.
SUM_TOLERANCE = 1e-3
# Of an output: a smaller share of it in the sum is what rounding has left, no residual multiplier.
LEAST_FACTOR = 0.02
# Rows and weights of the sum that are looked at.
SUM_SAMPLE = 4096


class ResidualStream:
    """Follows the stream through a block while it runs.

    Args:
        writers: the layers that write to it, in order.
        factors: c_l of each.
    """

    def __init__(self, writers: Mapping[str, nn.Module], factors: Mapping[str, float]) -> None:
        self._writers, self._factors = writers, factors
        self._now: Tensor | None = None

    def start(self, call: Call) -> None:
        """A call of the block begins."""
        self._now = stream_input(call.args, call.kwargs)

    def before(self, name: str) -> Tensor | None:
        """The stream that a layer is about to write to; None if it doesn't."""
        return self._now if name in self._writers else None

    @contextmanager
    def followed(self) -> Iterator[None]:
        """While this lasts, outputs of the writers are added."""
        with hooked(
            module.register_forward_hook(partial(self._add, self._factors[name]))
            for name, module in self._writers.items()
        ):
            yield

    def _add(self, factor: float, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self._now is not None:
            self._now = self._now + factor * output


def residual_writers(visit: Visit, layers: Mapping[str, nn.Module]) -> dict[str, float]:
    """The layers that write to the residual stream, in the order of their calls, with c_l.

    Found by least squares over the outputs that have the shape of the stream; {} if the block's
    output is not its input plus a weighted sum of them.
    """
    outputs: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        outputs[name] = output.detach().clone()  # what follows may write into it

    with hooked(m.register_forward_hook(partial(keep, name)) for name, m in layers.items()):
        result = visit.run(visit.block, visit.calls[0])
    after = result[0] if isinstance(result, (tuple, list)) else result
    before = stream_input(visit.calls[0].args, visit.calls[0].kwargs)
    if not isinstance(after, Tensor) or before is None or before.shape != after.shape:
        return {}
    names = [name for name, output in outputs.items() if output.shape == after.shape]
    if not names:
        return {}
    step = max(1, after.numel() // SUM_SAMPLE)

    def sampled(x: Tensor) -> Tensor:
        return x.detach().flatten()[::step].cpu().double()

    start, end = sampled(before), sampled(after)
    columns = torch.stack([sampled(outputs[name]) for name in names], dim=1)
    size = start.abs() + end.abs()
    # Sums round in proportion to their size: the few huge activations would drown the others.
    weight = (1 / (size + size.median()).clamp_min(torch.finfo(size.dtype).tiny)).unsqueeze(1)
    goal = end - start
    if not bool(torch.isfinite(columns).all() and torch.isfinite(goal).all()):
        return {}  # the layers' own statistics will say which activations aren't finite
    factors = torch.linalg.lstsq(columns * weight, goal.unsqueeze(1) * weight).solution.squeeze(1)
    error = (columns @ factors - goal).abs()
    rounding = 2 * torch.finfo(after.dtype).eps * size
    # NaN compares as False.
    if not bool((error <= SUM_TOLERANCE * goal.abs().max() + rounding).all()):
        return {}
    found = zip(names, factors.tolist(), strict=True)
    return {name: factor for name, factor in found if abs(factor) > LEAST_FACTOR}


def stream_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first floating-point tensor that a block is given: the residual stream."""
    values = (*args, *kwargs.values())
    return next((v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)
