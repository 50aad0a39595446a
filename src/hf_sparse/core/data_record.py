"""How calibration data were made: what a saved config keeps of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataRecord:
    """How calibration data were made; what a saved config keeps of them.

    Attributes:
        source: the Hub id, a file's name, or the type of the object that was passed.
        digest: SHA-256 of all model inputs in the order used; None before use.
        count: number of samples; None before use.
        tokens: number of tokens (padding not counted); None before use.
    """

    source: str
    digest: str | None = None
    count: int | None = None
    tokens: int | None = None
