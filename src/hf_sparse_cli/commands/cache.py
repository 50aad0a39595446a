"""`hf-sparse cache`: what was measured on this machine, and forgetting it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from ..command import Command
from ..failures import Failure


@dataclass(frozen=True)
class Cache:
    """The file, and what is in it: seconds, or times the dense product's speed, by product and way.

    Attributes:
        file: its path.
        measured: what is in it.
        cleared: has it been removed?
    """

    file: str
    measured: Mapping[str, Mapping[str, float]]
    cleared: bool = False

    def to_dict(self) -> Mapping[str, Any]:
        """All of it."""
        return asdict(self)

    def __str__(self) -> str:
        number = f"{len(self.measured)} measured products"
        if self.cleared:
            return f"{number} forgotten, {self.file} removed: they are measured again when needed"
        lines = [
            f"{key}: {', '.join(f'{way} {value:.3g}' for way, value in found.items())}"
            for key, found in sorted(self.measured.items())
        ]
        return "\n".join([*lines, f"{number} in {self.file}"])


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Forget all of it.")] = False,
) -> Cache:
    """Show or forget what was measured here.

    It is what the choice between kernels goes by.
    """
    from hf_sparse.kernels import timing

    file, measured = timing.cache_file(), timing.read_cache()
    if clear:
        try:
            timing.clear_cache()
        except OSError as error:
            raise Failure(f"{file} can't be removed: {error}") from None
    return Cache(str(file), measured, clear)


COMMAND = Command("cache", cache, ("hf-sparse cache", "hf-sparse cache --clear"))
