"""Numbers of bytes as users write them."""

from __future__ import annotations

import re
from decimal import Decimal

from .errors import ConfigError

_TEXT = re.compile(r"(\d+(?:\.\d+)?) *(?:([kmgt])(i?))?(b?)", re.IGNORECASE | re.ASCII)


def read_size(argument: str, size: int | str) -> int:
    """Bytes.

    Args:
        argument: whose value it is, for the error.
        size: bytes, or a text: a number, and B or KB, MB, GB, TB (powers of 1000) or KiB, MiB,
            GiB, TiB (of 1024). Always bytes: "gb" is taken for GB, and "Gb", which is read as bits
            elsewhere, for nothing.

    Raises:
        ConfigError: it is no size, or less than a byte.
    """
    found = size if isinstance(size, int) and not isinstance(size, bool) else _parse(size)
    if found < 1:
        raise ConfigError(
            f"{argument}={size!r} is no size: pass bytes or a text like '8GB' (8 * 1000**3) or "
            "'8GiB' (8 * 1024**3)"
        )
    return found


def _parse(size: object) -> int:
    """0 for what is none."""
    match = _TEXT.fullmatch(size.strip()) if isinstance(size, str) else None
    if match is None:
        return 0
    number, prefix, binary, b = match.groups(default="")
    if prefix and (not b or (prefix.isupper() and b == "b")):
        return 0
    power = " kmgt".index(prefix.lower() or " ")
    return int(Decimal(number) * (1024 if binary else 1000) ** power)
