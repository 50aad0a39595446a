"""The order inside a block: which layers' inputs depend on which other layers.

A stage is a set of layers none of which feeds another: q, k and v; then o; then gate and up; then
down. When a block is solved stage by stage, each stage's statistics are those of what the earlier
stages have left. Nothing is known of names or classes: the block runs once on one call with every
layer's output marked, and the autograd graph behind a layer's input shows whose outputs are in it.

`residual_writers` finds, from the same kind of run, the layers whose outputs are added up to the
block's own: y = x + sum of c_l y_l.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .block_walk import Visit

# Of the largest output: a residual sum that is reproduced this closely, and to the rounding of the
# model's dtype, is one.
SUM_TOLERANCE = 1e-3
# Of an output: a smaller share of it in the sum is what rounding has left, no residual multiplier.
LEAST_FACTOR = 0.02
# Rows and weights of the sum that are looked at.
SUM_SAMPLE = 4096


def find_stages(visit: Visit, layers: Mapping[str, nn.Module]) -> list[list[str]]:
    """Sort a block's layers into stages, first to last.

    Layers that the first call doesn't reach are in the first stage.
    """
    if len(layers) == 1:
        return [list(layers)]
    depth: dict[str, int] = {}
    owners: dict[Any, str] = {}

    def mark(name: str, args: tuple[Any, ...], output: Tensor) -> Tensor:
        found = _owners_behind(args[0], owners)
        depth[name] = max([depth.get(name, 0), *(depth[other] + 1 for other in found)])
        leaf = output.detach().requires_grad_()
        marked = leaf.clone()  # what follows may write into it, which a leaf forbids
        owners[marked.grad_fn] = name
        return marked

    with _watching(layers, mark), torch.enable_grad():
        visit.run(visit.block, visit.calls[0])
    stages: dict[int, list[str]] = {}
    for name in layers:
        stages.setdefault(depth.get(name, 0), []).append(name)
    return [stages[key] for key in sorted(stages)]


def residual_writers(visit: Visit, layers: Mapping[str, nn.Module]) -> dict[str, float]:
    """The layers that write to the residual stream, in the order of their calls, with c_l.

    Found by least squares over the outputs that have the shape of the stream; {} if the block's
    output is not its input plus a weighted sum of them.
    """
    outputs: dict[str, Tensor] = {}

    def keep(name: str, args: tuple[Any, ...], output: Tensor) -> None:
        outputs[name] = output.detach().clone()  # what follows may write into it

    with _watching(layers, keep):
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


@contextmanager
def _watching(
    layers: Mapping[str, nn.Module], see: Callable[[str, tuple[Any, ...], Tensor], Tensor | None]
) -> Iterator[None]:
    hooks = [
        module.register_forward_hook(lambda _, args, output, name=name: see(name, args, output))
        for name, module in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _owners_behind(x: Tensor, owners: Mapping[Any, str]) -> set[str]:
    """The layers whose marked outputs went into x: a walk through the graph down to them."""
    found: set[str] = set()
    seen: set[Any] = set()
    pending = [x.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in owners:
            found.add(owners[node])  # what is behind it is that layer's own
        else:
            pending += [parent for parent, _ in node.next_functions]
    return found
