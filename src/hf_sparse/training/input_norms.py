"""The norms of layers' inputs, collected while a model trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import TrainingError
from ..core.statistics import Statistics
from ..layers.axes import Axes
from ..layers.select import Target


class InputNorms:
    """Watches layers' inputs in training mode; all processes of a distributed run count.

    Args:
        targets: the layers.
    """

    def __init__(self, targets: Iterable[Target]) -> None:
        # Of each layer the sum of squares of each input, and behind them the number of tokens.
        self._sums: dict[str, Tensor] = {}
        self._hooks = []
        for target in targets:
            columns, device = target.shape[1], target.module.weight.device  # type: ignore[union-attr]
            self._sums[target.name] = torch.zeros(columns + 1, device=device)  # type: ignore[arg-type]
            hook = target.module.register_forward_pre_hook(self._watch(target.name))
            self._hooks.append(hook)

    def take(self) -> dict[str, Statistics]:
        """The column norms of each layer's inputs since the last call, by the layer's name.

        Raises:
            TrainingError: a layer has had no input, or one that is NaN or infinite.
        """
        return {name: self._statistics(name, sums) for name, sums in self._sums.items()}

    def remove(self) -> None:
        """Watch no longer."""
        for hook in self._hooks:
            hook.remove()

    def _statistics(self, name: str, sums: Tensor) -> Statistics:
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        squares, tokens = sums[:-1], sums[-1]
        if not bool(squares.any()):
            raise TrainingError(
                f"{name} has had no input since masks were last chosen, so its weights have no "
                f"score: pass method='magnitude' or modules_to_not_convert=[{name!r}]"
            )
        if not bool(torch.isfinite(squares).all()):
            raise TrainingError(
                f"the inputs of {name} are NaN or infinite, or overflow fp32 squared, so its "
                "weights have no score: pass method='magnitude', or a smaller learning rate"
            )
        norms = (squares / tokens).sqrt()
        sums.zero_()
        # No solver that makes do with norms reads the sample.
        return Statistics(int(tokens), norms.new_zeros(0, len(norms)), norms)

    def _watch(self, name: str) -> Any:
        sums = self._sums[name]

        @torch.no_grad()
        def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if module.training:
                x = Axes.of(module).channels_last(inputs[0]).flatten(0, -2)
                sums[:-1] += torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square()
                sums[-1] += len(x)

        return watch
