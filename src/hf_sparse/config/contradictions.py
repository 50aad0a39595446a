"""What arguments say together: what holds of them, and which can't. Values, not configs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from ..core.errors import ConfigError
from ..core.patterns import NM, Pattern, parse_pattern
from ..core.untrusted_text import brief
from ..formats.n_of_m import LARGEST_M
from .checks import choice, fraction, fractions
from .recipes import get_solver

DEFAULT_SPARSITY = 0.5
ALLOCATIONS = ("uniform", "owl", "fisher")

Sparsity = float | dict[str, float] | None


def resolve_sparsity(sparsity: Any, pattern: str, method: str, experts: float | None) -> Sparsity:
    """The sparsity that holds: given, implied by n:m, none beside the experts that go, or None
    where the method decides."""
    if get_solver(method).chooses_pattern:
        if sparsity is not None or pattern != "unstructured":
            raise ConfigError(
                f"method={method!r} keeps the zeros that are there: it takes neither sparsity "
                f"nor pattern, found sparsity={brief(sparsity)}, pattern={brief(pattern)}"
            )
        return None
    parsed = parse_pattern(pattern, DEFAULT_SPARSITY)
    if sparsity is None:
        alone = experts is not None and not isinstance(parsed, NM)
        return 0.0 if alone else parsed.sparsity
    if not isinstance(sparsity, (Mapping, list)):
        single = fraction("sparsity", sparsity)
        _check_sparsity(single, "", parsed, (parsed.sparsity,))
        return single
    if not sparsity:
        raise ConfigError(
            f"sparsity={sparsity!r} prunes nothing: pass {{regex: fraction}} or a fraction"
        )
    several = fractions("sparsity", sparsity)
    for regex, value in several.items():
        # A layer may be left alone.
        _check_sparsity(value, f" for {brief(regex)}", parsed, (parsed.sparsity, 0.0))
    return several


def _check_sparsity(value: float, where: str, pattern: Pattern, allowed: tuple[float, ...]) -> None:
    if isinstance(pattern, NM) and not any(math.isclose(value, a) for a in allowed):
        raise ConfigError(
            f"sparsity={value}{where} contradicts pattern='{pattern}', which makes "
            f"{Fraction(pattern.m - pattern.n, pattern.m)} of the weights zero: leave sparsity out"
        )


def resolve_allocation(
    given: Any, recipe: str, sparsity: Sparsity, pattern: str, method: str
) -> str | dict[str, float]:
    """The allocation that holds: a recipe's gives way where it has no meaning, a given one not."""
    obstacle = None
    if pattern != "unstructured":
        obstacle = f"pattern={pattern!r} fixes every layer's sparsity"
    elif isinstance(sparsity, dict):
        obstacle = "sparsity gives each layer its own already"
    elif sparsity is None:
        obstacle = f"method={method!r} keeps the zeros that are there"
    if given is None:
        return "uniform" if obstacle else recipe
    if given != "uniform" and obstacle:
        raise ConfigError(
            f"allocation={brief(given)} can't be met: {obstacle}. Leave allocation out"
        )
    if isinstance(given, (Mapping, list)):
        return fractions("allocation", given)
    return str(choice("allocation", given, ALLOCATIONS))


def check_method(
    method: str,
    *,
    refit: int,
    stages: bool,
    target: str,
    metric: str,
    low_rank: int,
    bits: int | None,
) -> None:
    """Raise a ConfigError if what goes with a method can't go with it."""
    if metric == "fisher" and not refit:
        raise ConfigError(
            "metric='fisher' is what the refit minimises, and refit is 0: pass refit=20"
        )
    extras = refit or stages or target != "layer" or bits is not None or low_rank
    if get_solver(method).chooses_pattern and extras:
        raise ConfigError(
            f"method={method!r} changes no weight: it takes neither refit, stages, "
            "target, low_rank nor bits"
        )


def check_format(
    format: str, *, pattern: str, method: str, low_rank: int, bits: int | None
) -> None:
    """Raise a ConfigError if a storage format can't hold what pruning will leave."""
    if format == "dense" and low_rank and bits is None:
        raise ConfigError(
            "format='dense' holds no low-rank part beside the weight: leave format out, or low_rank"
        )
    if format == "n:m" and pattern == "unstructured" and method != "keep":
        raise ConfigError("format='n:m' stores n:m patterns only: pass pattern='n:m', e.g. 2:4")
    parsed = parse_pattern(pattern, DEFAULT_SPARSITY)
    if format == "n:m" and isinstance(parsed, NM) and parsed.m > LARGEST_M:
        raise ConfigError(
            f"format='n:m' takes groups of at most {LARGEST_M}, pattern={pattern!r} has "
            f"m = {parsed.m}: pass format='auto' or 'bitmask'"
        )


def check_input_sparsity(share: float | None, bits: int | None) -> None:
    """Raise a ConfigError if inputs are to be skipped where no kernel can."""
    if share is not None and bits is not None:
        raise ConfigError(
            f"input_sparsity={share} would cost accuracy and gain nothing with bits={bits}: the "
            "kernels read all codes, whatever the inputs. Leave one of the two out"
        )
