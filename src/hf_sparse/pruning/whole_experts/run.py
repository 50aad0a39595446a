"""Experts removed from a model: counted, scored by the data, chosen; then they go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from ...calibration.whole_experts import ExpertStatistics
from ...config.sparse_config import SparseConfig
from ...core.errors import CalibrationError, ConfigError
from ...core.logging import get_logger
from ...layers.mixtures import Mixture, find_mixtures
from ..dense_measurements import DenseMeasurements
from ..expert_report import MixtureReport
from .choice import (
    SCORES,
    Groups,
    check_chosen,
    choose,
    numbers_kept,
    numbers_of_budget,
)
from .removal import Removal

logger = get_logger(__name__)

# A score is a mean over the tokens of an expert; over fewer than these it is known to 10 % or so.
FEW_TOKENS = 100


@dataclass(frozen=True)
class Choice:
    """Which experts stay; nothing is changed yet.

    Attributes:
        kept: their numbers in each mixture, ascending.
        removal: how the model changes.
        reports: what is to be told of each mixture.
    """

    kept: Mapping[str, Sequence[int]]
    removal: Removal
    reports: tuple[MixtureReport, ...]


@dataclass(frozen=True)
class ExpertPlan:
    """The mixtures of a model that are to lose experts; what can be checked without data is.

    Attributes:
        model: with all its experts.
        config: what to do.
        mixtures: by name.
        groups: of each.
        numbers: how many experts of each stay; None if their scores decide.
        removal: how the model changes then; None likewise.
    """

    model: PreTrainedModel
    config: SparseConfig
    mixtures: Mapping[str, Mixture]
    groups: Mapping[str, Groups]
    numbers: Mapping[str, int] | None = None
    removal: Removal | None = None

    @classmethod
    def of(cls, model: nn.Module, config: SparseConfig) -> ExpertPlan | None:
        """The plan of a config; None if no experts are to go.

        Raises:
            ConfigError: the model has no experts that can be removed, or not that share of them.
        """
        share = config.experts
        if share is None:
            return None
        if not isinstance(model, PreTrainedModel):
            raise ConfigError(
                f"experts={share} changes the config of a transformers model, and "
                f"{type(model).__name__} is none: leave experts out"
            )
        mixtures = find_mixtures(model)
        if not mixtures:
            raise ConfigError(
                f"experts={share}: {type(model).__name__} has no experts that can be taken apart, "
                "in a list or fused as transformers does it for its own kernels; those that are "
                "offloaded or tied can't be. Leave experts out"
            )
        groups = {name: Groups.of(model, mixture) for name, mixture in mixtures.items()}
        if config.expert_budget == "layer":
            numbers = numbers_kept(share, mixtures, groups)
            removal = Removal.of(model, mixtures, numbers)
            return cls(model, config, mixtures, groups, numbers, removal)
        if any(each.number > 1 for each in groups.values()):
            raise ConfigError(
                f"the routers of {type(model).__name__} choose among groups of equal size: pass "
                "expert_budget='layer'"
            )
        unequal = {name: len(mixture.experts) for name, mixture in mixtures.items()}
        unequal[next(iter(unequal))] -= 1
        Removal.of(model, mixtures, unequal)  # can the config say so?
        return cls(model, config, mixtures, groups)

    def choose(self, measurements: DenseMeasurements) -> Choice:
        """Score the experts with the calibration data; the model stays as it is.

        Raises:
            ConfigError: a token would find fewer experts than it goes to.
            CalibrationError: no token enters a mixture.
        """
        seen = measurements.experts(self.model, self.mixtures)
        if missing := [name for name in self.mixtures if name not in seen]:
            raise CalibrationError(
                f"no calibration token reached {missing[0]}, so its experts can't be compared: "
                "pass data with all inputs that the model takes"
            )
        scores = {name: SCORES[self.config.expert_score](found) for name, found in seen.items()}
        numbers = self.numbers
        if numbers is None:
            assert self.config.experts is not None
            least = {name: max(1, found.chosen) for name, found in seen.items()}
            numbers = numbers_of_budget(self.config.experts, scores, least)
        for name, number in numbers.items():
            check_chosen(number, seen[name], name, self.groups[name])
        _warn_of_few_tokens(seen)
        kept = choose(scores, numbers, self.groups)
        reports = tuple(_report(name, kept[name], scores[name], seen[name]) for name in kept)
        removal = self.removal or Removal.of(self.model, self.mixtures, numbers)
        return Choice(kept, removal, reports)

    def carry_out(self, choice: Choice) -> None:
        """Let the experts go, in place."""
        choice.removal.apply(self.model, self.mixtures, choice.kept)


def _report(
    name: str, kept: Sequence[int], scores: Tensor, seen: ExpertStatistics
) -> MixtureReport:
    shares = seen.tokens.double() / max(1, seen.entered)
    removed = tuple(index for index in range(len(scores)) if index not in kept)
    return MixtureReport(
        name, removed, tuple(scores.tolist()), tuple(shares.tolist()), seen.entered
    )


def _warn_of_few_tokens(seen: Mapping[str, ExpertStatistics]) -> None:
    few = [
        f"{name}.{index}"
        for name, found in seen.items()
        for index, tokens in enumerate(found.tokens.tolist())
        if tokens < FEW_TOKENS
    ]
    if few:
        total = sum(len(found.tokens) for found in seen.values())
        logger.warning(
            "%d of %d experts were reached by fewer than %d calibration tokens each, so their "
            "scores say little: %s%s. Pass more data, of all kinds that the model is to be used "
            "for",
            len(few),
            total,
            FEW_TOKENS,
            ", ".join(few[:4]),
            ", ..." if len(few) > 4 else "",
        )
