"""Storage formats: dense weights <-> packed tensors. A new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core.errors import ConfigError, FormatError
from ..core.grids import QuantizedWeight
from ..core.patterns import Pattern
from ..core.registry import Registry, check_frozen, unknown_name
from .base import Accepted, Format, Held, Layout, Rejected, TensorSpec
from .bitmask import Bitmask
from .dense import Dense
from .n_of_m import NMPacked
from .quantized import Quantized

# Of equally small layouts the first is chosen.
FORMATS: Registry[Layout] = Registry(
    "format",
    Layout,  # type: ignore[type-abstract]
    (Dense, NMPacked, Bitmask),
    check_frozen,
    reserved=("auto", Quantized.name),
)

__all__ = [
    "FORMATS",
    "Accepted",
    "Dense",
    "Format",
    "Held",
    "Layout",
    "Quantized",
    "Rejected",
    "TensorSpec",
    "check_format_name",
    "choose_format",
    "format_from_spec",
    "register_format",
]


def register_format(cls: type[Layout]) -> type[Layout]:
    """Make a layout of one's own a format like any other; usable as a decorator.

    From now on `format=` takes its name, "auto" considers it, codes are held in it too, and
    checkpoints with it are read: whoever loads them needs it registered.

    Args:
        cls: a frozen dataclass that derives from `hf_sparse.formats.Layout`.

    Returns:
        The class.

    Raises:
        RegistrationError: it lacks a method, is no frozen dataclass, or its name is taken.
    """
    return FORMATS.register(cls)


def choose_format(held: Held, pattern: Pattern, requested: str) -> Format:
    """The format for one pruned weight: the requested one, or for "auto" the smallest that fits.

    Args:
        held: a pruned weight, shape (out, in), or its codes; the format then holds them, in the
            layout that was requested or is the smallest.
        pattern: what it was pruned to.
        requested: a name in `FORMATS`, or "auto".

    Raises:
        ConfigError: the requested format does not exist or can't hold this weight.
    """
    grid = held.scales.grid if isinstance(held, QuantizedWeight) else None
    values = held.codes if isinstance(held, QuantizedWeight) else held
    bits = None if grid is None else grid.bits
    if requested == "auto":
        verdicts = [cls.fits(values, pattern, bits) for cls in FORMATS.values()]
        accepted = [verdict for verdict in verdicts if isinstance(verdict, Accepted)]
        layout = min(accepted, key=lambda verdict: verdict.bytes).format
    else:
        verdict = FORMATS[check_format_name(requested)].fits(values, pattern, bits)
        if isinstance(verdict, Rejected):
            raise ConfigError(f"format={requested!r} can't hold this weight: {verdict.reason}")
        layout = verdict.format
    return layout if grid is None else Quantized(grid, layout)


def check_format_name(name: object) -> str:
    """`name` if a format is registered under it, else a ConfigError that lists what exists."""
    if not isinstance(name, str) or name not in FORMATS:
        raise ConfigError(unknown_name("format", name, ["auto", *FORMATS]))
    return name


def format_from_spec(spec: Mapping[str, Any]) -> Format:
    """Rebuild a format from the JSON object that a checkpoint keeps for a layer.

    Raises:
        FormatError: the name is not registered, or its parameters are not what it needs.
    """
    parameters = dict(spec)
    name = parameters.pop("format", None)
    if name == Quantized.name:
        return Quantized.from_parameters(parameters, _layout(parameters.pop("layout", None)))
    return _layout(spec)


def _layout(spec: object) -> Layout:
    parameters = dict(spec) if isinstance(spec, Mapping) else {}
    name = parameters.pop("format", None)
    if not isinstance(name, str) or name not in FORMATS:
        known = ", ".join([*FORMATS, Quantized.name])
        raise FormatError(
            f"storage format {name!r} is not known (known: {known}); "
            "a newer hf_sparse may have written this file"
        )
    return FORMATS[name].from_parameters(parameters)
