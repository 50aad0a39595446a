"""Statistics of experts: from the tokens routed to each, and what to do if these are few.

An expert's layer that fewer than m tokens reached takes the missing ones from the mean over all T
tokens that enter the experts of its block, sent through this expert:

    H = t/m H_routed + (1 - t/m) H_all,    t < m tokens routed to it

so that it is H_routed from m tokens on, and H_all for an expert that none reached. The same goes
for column norms, squared, and cross moments. Tokens are sent through an expert beside the model's
own pass, whose outputs they don't touch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from ..core.statistics import Needs, shrink
from .block_walk import Visit
from .expert_routing import find_experts
from .layer_statistics import DensePath, Observed, collect_statistics
from .owners import Owners


def observe(
    visit: Visit,
    layers: Mapping[str, nn.Module],
    needs: Needs,
    dense: DensePath | None = None,
    min_tokens: int | None = None,
    everywhere: bool = False,
    owners: Owners | None = None,
) -> dict[str, Observed]:
    """`collect_statistics`, with enough of every expert.

    Args:
        visit, layers, needs, dense, owners: as there.
        min_tokens: m of an expert's layer; None for as many as it has inputs, or for 1 where column
            norms are all that is needed, which a few tokens tell.
        everywhere: take all tokens for all experts, routed to them or not.
    """
    experts = find_experts(visit.block.module, layers)
    if not experts:
        return collect_statistics(visit, layers, needs, dense, owners=owners)
    stay = replace(dense, leave=False) if dense else None
    routed = {n: m for n, m in layers.items() if not (everywhere and m in experts)}
    found = collect_statistics(visit, routed, needs, stay, owners=owners) if routed else {}
    few_do = 1 if needs < Needs.HESSIAN else None
    least = few_do if min_tokens is None or needs is Needs.NOTHING else min_tokens
    limits = {
        name: _inputs(module) if least is None else least
        for name, module in layers.items()
        if module in experts
    }
    few = {
        name: layers[name]
        for name, limit in limits.items()
        if name not in found or _tokens(found[name]) < limit
    }
    shared = collect_statistics(visit, few, needs, stay, True, owners) if few else {}
    for name, seen in shared.items():
        found[name] = seen if everywhere else _filled(found.get(name), seen, limits[name])
    if dense and dense.leave:
        with dense.weights():
            for call in visit.dense_calls:
                visit.leave_dense(call)
    return {name: found[name] for name in layers if name in found}


def _filled(own: Observed | None, shared: Observed, limit: int) -> Observed:
    total, routed = _tokens(shared), _tokens(own) if own else 0
    note = f"{routed} calibration tokens were routed to it, fewer than {max(limit, 1)}: the rest "
    note += f"of its statistics is the mean of all {total} that enter the experts"
    if own is None:
        return Observed(replace(shared.statistics, tokens=0), note=note)
    note = f"{own.note}; {note}" if own.note else note
    return Observed(shrink(own.statistics, shared.statistics, routed / limit), note=note)


def _inputs(layer: nn.Module) -> int:
    """How many a linear layer, or the one that an adapter wraps, has."""
    linear = getattr(layer, "base_layer", layer)
    assert isinstance(linear, nn.Linear)
    return linear.in_features


def _tokens(observed: Observed) -> int:
    return observed.statistics.tokens
