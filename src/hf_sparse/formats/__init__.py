"""Storage formats: dense weights <-> packed tensors. A new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..core.errors import ConfigError, FormatError
from ..core.grids import QuantizedWeight
from ..core.patterns import Pattern
from ..core.registry import Registry, check_frozen, unknown_name
from .base import Accepted, Format, Layout, Packed, Rejected, TensorSpec
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
    "Layout",
    "Quantized",
    "Rejected",
    "TensorSpec",
    "check_format_name",
    "choose_format",
    "format_from_spec",
    "pack_weight",
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


def choose_format(
    weight: Tensor, pattern: Pattern, requested: str, quantized: QuantizedWeight | None = None
) -> Format:
    """The format for one pruned weight: the requested one, or for "auto" the smallest that fits.

    Args:
        weight: pruned weight, shape (out, in).
        pattern: what it was pruned to.
        requested: a name in `FORMATS`, or "auto".
        quantized: the weight's codes; the format then holds them, in the layout that was
            requested or is the smallest. None: the weight's own values.

    Raises:
        ConfigError: the requested format does not exist or can't hold this weight.
    """
    held, bits = weight, None
    if quantized is not None:
        held, bits = quantized.codes, quantized.scales.grid.bits
    if requested == "auto":
        verdicts = [cls.fits(held, pattern, bits) for cls in FORMATS.values()]
        accepted = [verdict for verdict in verdicts if isinstance(verdict, Accepted)]
        layout = min(accepted, key=lambda verdict: verdict.bytes).format
    else:
        verdict = FORMATS[check_format_name(requested)].fits(held, pattern, bits)
        if isinstance(verdict, Rejected):
            raise ConfigError(f"format={requested!r} can't hold this weight: {verdict.reason}")
        layout = verdict.format
    return layout if quantized is None else Quantized(quantized.scales.grid, layout)


def pack_weight(fmt: Format, weight: Tensor, quantized: QuantizedWeight | None = None) -> Packed:
    """Pack what `choose_format` has chosen a format for."""
    if isinstance(fmt, Quantized):
        assert quantized is not None, "a quantised format packs codes"
        return fmt.pack(quantized)
    assert isinstance(fmt, Layout)
    return fmt.pack(weight)


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
