"""Storage formats: dense weights <-> packed tensors. A new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import ConfigError, FormatError
from ..patterns import Pattern
from .base import Accepted, Format, Rejected, TensorSpec
from .bitmask import Bitmask
from .dense import Dense
from .nm import NMPacked

# Of equally small formats the first is chosen.
FORMATS: dict[str, type[Format]] = {cls.name: cls for cls in (Dense, NMPacked, Bitmask)}

__all__ = [
    "FORMATS",
    "Accepted",
    "Dense",
    "Format",
    "Rejected",
    "TensorSpec",
    "check_format_name",
    "choose_format",
    "format_from_spec",
]


def choose_format(weight: Tensor, pattern: Pattern, requested: str) -> Format:
    """The format for one pruned weight: the requested one, or for "auto" the smallest that fits.

    Args:
        weight: pruned weight, shape (out, in).
        pattern: what it was pruned to.
        requested: a name in `FORMATS`, or "auto".

    Raises:
        ConfigError: the requested format does not exist or can't hold this weight.
    """
    if requested == "auto":
        verdicts = [cls.fits(weight, pattern) for cls in FORMATS.values()]
        accepted = [verdict for verdict in verdicts if isinstance(verdict, Accepted)]
        return min(accepted, key=lambda verdict: verdict.bytes).format
    verdict = FORMATS[check_format_name(requested)].fits(weight, pattern)
    if isinstance(verdict, Rejected):
        raise ConfigError(f"format={requested!r} can't hold this weight: {verdict.reason}")
    return verdict.format


def check_format_name(name: object) -> str:
    """`name` if a format is registered under it, else a ConfigError that lists what exists."""
    if not isinstance(name, str) or name not in FORMATS:
        raise ConfigError(
            f"format={name!r} does not exist: pass 'auto' or one of {', '.join(FORMATS)}"
        )
    return name


def format_from_spec(spec: Mapping[str, Any]) -> Format:
    """Rebuild a format from the JSON object that a checkpoint keeps for a layer.

    Raises:
        FormatError: the name is not registered, or its parameters are not what it needs.
    """
    parameters = dict(spec)
    name = parameters.pop("format", None)
    if not isinstance(name, str) or name not in FORMATS:
        raise FormatError(
            f"storage format {name!r} is not known (known: {', '.join(FORMATS)}); "
            "a newer hf_sparse may have written this file"
        )
    return FORMATS[name].from_parameters(parameters)
