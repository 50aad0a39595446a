"""Which experts stay: those with the highest scores, in each layer or in all layers together.

    reap          mean over the tokens routed to expert j of g_j(x) ||f_j(x)||: what its removal
                  takes from the output of such a token (Lasby et al. 2025, REAP)
    contribution  their sum: what it takes from the output of all tokens
    frequency     how many tokens are routed to it
    norm          sum over these of ||f_j(x)||, its activation norm (Jaiswal et al. 2025)

Where a router first chooses groups of consecutive experts, each group loses as many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from ...calibration.whole_experts import ExpertStatistics
from ...core.errors import ConfigError
from ...core.patterns import Unstructured
from ...layers.mixtures import Mixture

SCORES: Mapping[str, Callable[[ExpertStatistics], Tensor]] = {
    "reap": lambda seen: seen.gated_norms / seen.tokens.clamp_min(1),
    "contribution": lambda seen: seen.gated_norms,
    "frequency": lambda seen: seen.tokens.double(),
    "norm": lambda seen: seen.norms,
}


@dataclass(frozen=True)
class Groups:
    """The groups of consecutive experts that a router chooses among first; one if it doesn't.

    Attributes:
        number: how many there are.
        chosen: from how many of them a token's experts come.
    """

    number: int = 1
    chosen: int = 1

    @classmethod
    def of(cls, model: torch.nn.Module, mixture: Mixture) -> Groups:
        """As the modules beside the experts have it."""
        for module in model.get_submodule(mixture.home.rstrip(".")).modules():
            number, chosen = (getattr(module, n, None) for n in ("num_group", "topk_group"))
            if isinstance(number, int) and isinstance(chosen, int) and number > 1:
                return cls(number, chosen)
        return cls()


def numbers_kept(
    share: float, mixtures: Mapping[str, Mixture], groups: Mapping[str, Groups]
) -> dict[str, int]:
    """How many experts of each mixture stay when a share of each one's goes.

    Raises:
        ConfigError: none would go, or a mixture's groups would be unequal.
    """
    kept = {}
    for name, mixture in mixtures.items():
        total, parts = len(mixture.experts), groups[name].number
        removed = Unstructured(share).zeros(total)
        if not removed:
            raise ConfigError(
                f"experts={share} removes none of the {total} experts of {name}: pass at least "
                f"{_up(1 / total)}"
            )
        if removed % parts:
            fewer, more = removed - removed % parts, removed - removed % parts + parts
            shares = [n / total for n in (fewer, more) if 0 < n < total]
            raise ConfigError(
                f"experts={share} removes {removed} of the {total} experts of {name}, whose router "
                f"chooses among {parts} groups of equal size: pass "
                f"{' or '.join(map(str, shares))}"
            )
        kept[name] = total - removed
    return kept


def _up(share: float) -> float:
    """Rounded up to what can be read."""
    return -(-share * 1000 // 1) / 1000


def choose(
    scores: Mapping[str, Float64[Tensor, " experts"]],
    numbers: Mapping[str, int],
    groups: Mapping[str, Groups],
) -> dict[str, list[int]]:
    """The experts of each mixture that stay, ascending: as many as `numbers` says."""
    kept = {}
    for name, score in scores.items():
        parts = score.view(groups[name].number, -1)
        each = numbers[name] // len(parts)
        order = parts.argsort(dim=1, descending=True, stable=True)[:, :each]
        starts = torch.arange(len(parts)).unsqueeze(1) * parts.shape[1]
        kept[name] = sorted((order.cpu() + starts).flatten().tolist())
    return kept


def numbers_of_budget(
    share: float, scores: Mapping[str, Float64[Tensor, " experts"]], least: Mapping[str, int]
) -> dict[str, int]:
    """How many experts of each mixture stay when a share of all goes, those with lowest scores.

    Scores are compared as shares of their mixture's mean: outputs grow with depth.

    Args:
        share: of the experts of all mixtures together.
        scores: by mixture.
        least: how many a mixture must keep.

    Raises:
        ConfigError: no experts can be spared.
    """
    total = sum(map(len, scores.values()))
    budget = Unstructured(share).zeros(total)
    ranked = sorted(
        (float(value) / max(float(score.mean()), 1e-300), name)
        for name, score in scores.items()
        for value in score
    )
    kept = {name: len(score) for name, score in scores.items()}
    for _, name in ranked:
        if budget and kept[name] > least[name]:
            kept[name] -= 1
            budget -= 1
    if budget or kept == {name: len(score) for name, score in scores.items()}:
        raise ConfigError(
            f"experts={share} of the {total} experts of all layers can't be removed: at least "
            f"{sum(least.values())} have to stay, and one has to go"
        )
    return kept


def check_chosen(kept: int, seen: ExpertStatistics, name: str, groups: Groups) -> None:
    """Raise a ConfigError if a token can't go to as many experts as it does."""
    each = kept // groups.number
    within = each * min(groups.chosen, groups.number)
    if within < seen.chosen or (groups.number > 1 and each < 2):
        where = f" in the {groups.chosen} groups that it chooses first" if groups.number > 1 else ""
        raise ConfigError(
            f"the router of {name} sends each token to {seen.chosen} experts, and {within} of "
            f"{len(seen.tokens)} would be left{where}: pass a smaller share of experts"
        )
