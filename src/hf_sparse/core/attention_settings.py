"""What a user may say of sparse attention; without torch, for the command line's `--help`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from .errors import ConfigError
from .registry import did_you_mean, unknown_name
from .untrusted_text import brief
from .whole_number import whole_number

# What each name selects, and what stands for the pairs that it doesn't.
METHODS: Mapping[str, tuple[str, str]] = {
    "hs_block": ("block", "nothing"),
    "hs_smyrf": ("smyrf", "nothing"),
    "hs_routing": ("routing", "nothing"),
    "hs_mongoose": ("mongoose", "nothing"),
    "hs_performer": ("own", "favor"),
    "hs_scatterbrain": ("smyrf", "favor"),
}
# Of each number. Memory is taken for a block of queries times its keys, and for features: what is
# larger than these is a mistake, or an attempt to take all memory.
LARGEST = {
    "keys": 2**31 - 1,
    "from_length": 2**31 - 1,
    "seed": 2**31 - 1,
    "block": 2**16,
    "key_block": 2**16,
    "features": 2**16,
}


@dataclass(frozen=True)
class AttentionSettings:
    """How a model's attention is made sparse.

    Attributes:
        method: name of the attention implementation, e.g. "hs_block".
        keys: keys that a query attends to exactly, about; the budget of the selector.
        block: consecutive queries that share their keys.
        key_block: consecutive keys that are picked together.
        from_length: keys from which on it is used; attention to fewer is exact.
        selector: what picks the pairs, instead of the method's: "own", "block", "smyrf",
            "routing" or "mongoose"; "" for the method's.
        residual: what stands for the other pairs: "nothing", "centroids" or "favor"; "" for the
            method's.
        features: random features of "favor".
        seed: of random features and of what is learned.
    """

    method: str = "hs_block"
    keys: int = 1536
    block: int = 128
    key_block: int = 16
    from_length: int = 8192
    selector: str = ""
    residual: str = ""
    features: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("method", "selector", "residual"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"attention {name}={brief(getattr(self, name))} must be a name")
        if self.method not in METHODS:
            raise ConfigError(unknown_name("attention method", self.method, METHODS))
        selector, residual = METHODS[self.method]
        object.__setattr__(self, "selector", self.selector or selector)
        object.__setattr__(self, "residual", self.residual or residual)
        for name in ("keys", "block", "key_block", "features"):
            self._check_integer(name, 1)
        self._check_integer("from_length", 0)
        self._check_integer("seed", 0)

    def _check_integer(self, name: str, least: int) -> None:
        value, most = getattr(self, name), LARGEST[name]
        number = whole_number(value)
        if number is None or not least <= number <= most:
            raise ConfigError(
                f"attention {name}={brief(value)} must be an integer of at least {least} and "
                f"at most {most}"
            )
        object.__setattr__(self, name, number)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; `check_attention` makes the same of it."""
        return asdict(self)


def check_attention(name: str, value: Any) -> AttentionSettings | None:
    """The settings that a method's name or a mapping of settings stands for; None for none.

    Raises:
        ConfigError: it is neither, or a setting is unknown or out of its range.
    """
    if value is None or isinstance(value, AttentionSettings):
        return value
    if isinstance(value, str):
        return AttentionSettings(value)
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{name}={brief(value)} must be a method, {' or '.join(map(repr, METHODS))}, or a dict "
            'of settings, e.g. {"method": "hs_block", "keys": 1536}'
        )
    known = [field.name for field in fields(AttentionSettings)]
    for key in value:
        if key not in known:
            near = did_you_mean(key, known)
            raise ConfigError(
                f"{name} has no setting {brief(key)}{f' ({near})' if near else ''}; it knows "
                f"{', '.join(known)}"
            )
    return AttentionSettings(**value)
