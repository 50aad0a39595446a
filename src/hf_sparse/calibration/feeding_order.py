"""The order inside a block: which layers' inputs depend on which other layers.

A stage is a set of layers none of which feeds another: q, k and v; then o; then gate and up; then
down. When a block is solved stage by stage, each stage's statistics are those of what the earlier
stages have left. Nothing is known of names or classes: the block runs once on one call with every
layer's output marked, and the autograd graph behind a layer's input shows whose outputs are in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .block_walk import Visit
from .hooks import hooked


def find_stages(visit: Visit, layers: Mapping[str, nn.Module]) -> list[list[str]]:
    """Sort a block's layers into stages, first to last.

    Layers that the first call doesn't reach are in the first stage.
    """
    if len(layers) == 1:
        return [list(layers)]
    depth: dict[str, int] = {}
    owners: dict[Any, str] = {}

    def mark(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        found = _owners_behind(args[0], owners)
        depth[name] = max([depth.get(name, 0), *(depth[other] + 1 for other in found)])
        leaf = output.detach().requires_grad_()
        marked = leaf.clone()  # what follows may write into it, which a leaf forbids
        owners[marked.grad_fn] = name
        return marked

    hooks = (m.register_forward_hook(partial(mark, name)) for name, m in layers.items())
    with hooked(hooks), torch.enable_grad():
        visit.run(visit.block, visit.calls[0])
    stages: dict[int, list[str]] = {}
    for name in layers:
        stages.setdefault(depth.get(name, 0), []).append(name)
    return [stages[key] for key in sorted(stages)]


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
