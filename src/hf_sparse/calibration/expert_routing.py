"""Which tokens reach the experts of a block, in the pass that is under way.

The layers of an expert see the tokens that are routed to it, in the order of the tokens; which
ones these are is told by the choice that their `SparseExperts` is called with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers.experts import SparseExperts, chosen_slots
from .hooks import hooked
from .padding import Padding


class Routed(NamedTuple):
    """Of an expert's layer: which of its rows are no padding, and the tokens that those are."""

    rows: Tensor
    tokens: Tensor


class ExpertRouting:
    """The choices of a block's routers in a pass.

    Args:
        block: the module that runs.
        layers: those of its layers that are watched.
        everywhere: send all tokens that enter the experts through each watched one, beside the
            model's own pass: those rows are then an expert's, not the ones routed to it.
    """

    def __init__(self, block: nn.Module, layers: Mapping[str, nn.Module], everywhere: bool) -> None:
        self._experts = find_experts(block, layers)
        self._choices: dict[SparseExperts, Tensor] = {}
        self._everywhere = everywhere
        self.beside = False

    def is_counted(self, module: nn.Module) -> bool:
        """Are the rows that a layer is called with now those to collect?"""
        return module not in self._experts or self._everywhere == self.beside

    def routed(self, module: nn.Module, padding: Padding) -> Routed | None:
        """Whose rows an expert's layer is called with now; None for another layer's."""
        if self._everywhere or module not in self._experts:
            return None
        experts, index = self._experts[module]
        choice = self._choices[experts]
        tokens = chosen_slots(choice, index) // choice.shape[1]
        inside = torch.ones_like(tokens, dtype=torch.bool)
        mask = padding.tokens(experts, len(choice))
        if mask is not None:
            inside = mask.to(tokens.device)[tokens]
        return Routed(inside, tokens[inside])

    @contextmanager
    def followed(self, tokens: Callable[[nn.Module, Tensor], Tensor]) -> Iterator[None]:
        """While this lasts the choices are kept.

        Args:
            tokens: the rows of a module's input that are no padding.
        """

        def enter(experts: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            assert isinstance(experts, SparseExperts)
            call = signature(experts.forward).bind(*args, **kwargs).arguments
            self._choices[experts] = call["top_k_index"]
            if self._everywhere:
                self._send_everywhere(experts, tokens(experts, call["hidden_states"]))

        owners = {experts for experts, _ in self._experts.values()}
        with hooked(m.register_forward_pre_hook(enter, with_kwargs=True) for m in owners):
            yield

    def _send_everywhere(self, experts: SparseExperts, rows: Tensor) -> None:
        self.beside = True
        try:
            for index in sorted({i for owner, i in self._experts.values() if owner is experts}):
                experts.expert(index)(rows)
        finally:
            self.beside = False


def find_experts(
    block: nn.Module, layers: Mapping[str, nn.Module]
) -> dict[nn.Module, tuple[SparseExperts, int]]:
    """Those of a block's layers that belong to an expert, with its module and its number there."""
    wanted = set(layers.values())
    return {
        layer: (experts, index)
        for experts in block.modules()
        if isinstance(experts, SparseExperts)
        for index in range(experts.num_experts)
        for layer in experts.layers(index)
        if layer in wanted
    }
