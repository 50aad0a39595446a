"""The norms of layers' inputs, collected while a model trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..core.errors import TrainingError
from ..layers.axes import Axes
from ..layers.select import Target


class InputNorms:
    """Watches layers' inputs in training mode; all processes of a distributed run count.

    Args:
        targets: the layers.
    """

    def __init__(self, targets: Iterable[Target]) -> None:
        self._squares: dict[str, Tensor] = {}
        self._hooks = []
        for target in targets:
            columns, device = target.shape[1], target.module.weight.device  # type: ignore[union-attr]
            self._squares[target.name] = torch.zeros(columns, device=device)  # type: ignore[arg-type]
            hook = target.module.register_forward_pre_hook(self._watch(target.name))
            self._hooks.append(hook)

    def take(self) -> dict[str, Float[Tensor, " in"]]:
        """The root of the sum of squares of each input since the last call, by layer.

        Raises:
            TrainingError: a layer has had no input.
        """
        norms = {}
        for name, squares in self._squares.items():
            if torch.distributed.is_initialized():
                torch.distributed.all_reduce(squares)
            if not bool(squares.any()):
                raise TrainingError(
                    f"{name} has had no input since masks were last chosen, so wanda has no score "
                    f"for it: pass method='magnitude' or modules_to_not_convert=[{name!r}]"
                )
            norms[name] = squares.sqrt()
            squares.zero_()
        return norms

    def remove(self) -> None:
        """Watch no longer."""
        for hook in self._hooks:
            hook.remove()

    def _watch(self, name: str) -> Any:
        squares = self._squares[name]

        @torch.no_grad()
        def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if module.training:
                x = Axes.of(module).channels_last(inputs[0]).flatten(0, -2)
                squares.add_(torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square())

        return watch
