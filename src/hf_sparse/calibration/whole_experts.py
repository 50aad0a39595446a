"""Statistics of whole experts: how many tokens each gets, and how large its outputs are.

A mixture's output is the sum of g_j(x) f_j(x) over the experts j that its router chooses for a
token x. The gate g_j(x) is the derivative of that sum by f_j(x), whichever way the model computes
it: renormalised over the chosen ones or not, scaled, cut off at a capacity. So that is what is
taken for it, and nothing has to be known of routers. Rows of padding are left out by weights of 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..core.errors import CalibrationError
from ..layers.mixtures import Mixture
from .block_walk import Visit
from .hooks import hooked
from .padding import Padding


@dataclass(frozen=True)
class ExpertStatistics:
    """Sums over the tokens of the calibration data that were routed to each expert of a mixture.

    Attributes:
        tokens: how many these are; those whose gate is 0 don't count.
        norms: of ||f_j(x)||.
        gated_norms: of g_j(x) ||f_j(x)||.
        entered: how many tokens entered the mixture.
        chosen: to how many experts a token goes.
    """

    tokens: Int64[Tensor, " experts"]
    norms: Float64[Tensor, " experts"]
    gated_norms: Float64[Tensor, " experts"]
    entered: int
    chosen: int


def collect_experts(visit: Visit, mixtures: Mapping[str, Mixture]) -> dict[str, ExpertStatistics]:
    """Run a visit's block on all calls: statistics of the mixtures in it, by name.

    A mixture that no token entered is left out.

    Args:
        visit: a block and the calls that stand in front of it.
        mixtures: of the model; those outside the block aren't run.

    Raises:
        CalibrationError: an expert's outputs are NaN or infinite, or are not multiplied by one gate
            a token; names the mixture.
    """
    inside = set(visit.block.module.modules())
    sums = {name: _Sums(m) for name, m in mixtures.items() if m.caller in inside}
    with torch.no_grad():
        for call in visit.calls:
            with _watched(sums, call.padding):
                visit.run(visit.block, call)
    return {name: found.finish() for name, found in sums.items() if found.entered}


@contextmanager
def _watched(sums: Mapping[str, _Sums], padding: Padding) -> Iterator[None]:
    """While this lasts what mixtures compute is added up; their outputs stay the same."""

    def handles() -> Iterator[Any]:
        for each in sums.values():
            for index, expert in enumerate(each.mixture.experts):
                # The gradient flows through what comes after the experts alone.
                yield expert.register_forward_pre_hook(lambda *_: _record_gradients(False))
                yield expert.register_forward_hook(partial(each.take, index), always_call=True)
            caller = each.mixture.caller
            yield caller.register_forward_pre_hook(lambda *_: _record_gradients(True))
            yield caller.register_forward_hook(partial(each.add, padding), always_call=True)

    with hooked(handles()):
        yield


def _record_gradients(enabled: bool) -> None:
    torch.set_grad_enabled(enabled)


class _Sums:
    """What adds up of one mixture over its calls."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture
        self.entered = self._chosen = 0
        number = len(mixture.experts)
        self._tokens = torch.zeros(number, dtype=torch.int64)
        self._norms, self._gated = torch.zeros(2, number, dtype=torch.float64)
        self._outputs: list[tuple[int, Tensor]] = []  # of the call that is under way

    def take(self, index: int, expert: nn.Module, args: Any, output: Any) -> Any:
        """An expert has computed: the rest of the mixture goes on with a leaf of the graph."""
        _record_gradients(True)
        if not isinstance(output, Tensor):
            return output
        leaf = output.detach().requires_grad_()
        self._outputs.append((index, leaf))
        return leaf.clone()  # what follows may write into it, which a leaf forbids

    def add(self, padding: Padding, caller: nn.Module, args: Any, output: Any) -> Any:
        """The mixture has computed: read its gates off."""
        _record_gradients(False)
        outputs, self._outputs = self._outputs, []
        whole = next((x for x in tree_leaves(output) if isinstance(x, Tensor)), None)
        if whole is None:
            return output
        rows = whole.shape[:-1].numel()
        mask = padding.tokens(caller, rows)
        counted = torch.ones(rows) if mask is None else mask.to("cpu", torch.float32)
        self.entered += int(counted.sum())
        if outputs and rows:
            leaves = [leaf for _, leaf in outputs]
            weights = counted.to(whole).view(*whole.shape[:-1], 1).expand_as(whole)
            gates = torch.autograd.grad(whole, leaves, weights, allow_unused=True)
            for (index, leaf), gate in zip(outputs, gates, strict=True):
                if gate is not None:
                    self._count(index, leaf.detach(), gate)
            used = sum(leaf.shape[:-1].numel() for leaf in leaves)
            self._chosen = max(self._chosen, -(-used // rows))
        return tree_map_only(Tensor, Tensor.detach, output)

    def finish(self) -> ExpertStatistics:
        if not bool(torch.isfinite(self._gated).all() & torch.isfinite(self._norms).all()):
            raise CalibrationError(
                f"experts of {self.mixture.name} give NaN or infinite outputs on the calibration "
                "data; load the model in torch.bfloat16 or torch.float32"
            )
        return ExpertStatistics(self._tokens, self._norms, self._gated, self.entered, self._chosen)

    def _count(self, index: int, output: Tensor, gate: Tensor) -> None:
        gates = gate.flatten(0, -2)
        wide = torch.promote_types(output.dtype, torch.float32)
        norms = torch.linalg.vector_norm(output.flatten(0, -2), dim=-1, dtype=wide)
        least, most = gates.aminmax(dim=-1)
        if not torch.allclose(least, most, rtol=1e-2, equal_nan=True):
            raise CalibrationError(
                f"{self.mixture.name} multiplies an expert's output by more than one number a "
                "token, so its experts can't be compared: leave experts out"
            )
        routed = (gates[:, 0] != 0).double()
        self._tokens[index] += int(routed.sum())
        self._norms[index] += float((norms.double() * routed).sum())
        self._gated[index] += float((norms.double() * gates[:, 0].double()).sum())
