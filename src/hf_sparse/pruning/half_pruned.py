"""A model whose pruning broke off: it says so, and can't be saved, run or pruned again.

Some of its blocks are sparse and others are not, and what a run needed to go on is gone. Keeping
every dense weight to go back to would take the memory of a second model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

from torch import nn

from ..core.errors import ConfigError, SaveError, SolveError
from ..layers.blocks import Block

_MARK = "_pruning_broke_off"
_REFUSED = {
    "forward": SolveError,
    "generate": SolveError,
    "save_pretrained": SaveError,
    "push_to_hub": SaveError,
}


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        blocks: what is to be pruned.
        solved: names of the layers whose weights are no longer what they were.
    """

    blocks: Sequence[Block] = ()
    solved: set[str] = field(default_factory=set)

    def done(self) -> list[str]:
        """Names of the blocks that are pruned."""
        return [block.name for block in self.blocks if self.solved.issuperset(block.targets)]


@contextmanager
def marked_if_broken_off(model: nn.Module) -> Iterator[Progress]:
    """While a run over a model lasts; what it changes goes into the progress.

    If an exception ends it after that, Ctrl-C as well, the model and those inside it refuse what
    they can't do any more, and the exception says so: in its message, or in a note below where it
    has a message of another making, as an OSError.
    """
    progress = Progress()
    try:
        yield progress
    except BaseException as error:
        if progress.solved:
            done, total = progress.done(), len(progress.blocks)
            text = (
                f"pruning broke off when {len(done)} of {total} blocks were done"
                f"{' (' + _names(done) + ')' if done else ''}, so that {type(model).__name__} is "
                "half pruned and can't be saved, run or pruned again: load the dense model anew"
            )
            _mark(model, text)
            _tell(error, text)
        raise


def check_not_half_pruned(model: nn.Module) -> None:
    """Raise a ConfigError if pruning broke off in a model."""
    text = getattr(model, _MARK, None)
    if text is not None:
        raise ConfigError(text)


def _mark(model: nn.Module, text: str) -> None:
    inside = [module for module in model.modules() if hasattr(module, "save_pretrained")]
    for module in {model, *inside}:
        setattr(module, _MARK, text)
        for name, kind in _REFUSED.items():
            if hasattr(module, name):
                setattr(module, name, partial(_refuse, kind, text))


def _tell(error: BaseException, text: str) -> None:
    before = error.args
    error.args = (f"{error}; {text}" if str(error) else text,)
    if text not in str(error):
        error.args = before
        error.add_note(text)


def _refuse(kind: type[Exception], text: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise kind(text)


def _names(done: Sequence[str]) -> str:
    return ", ".join(done) if len(done) <= 4 else f"{done[0]}, {done[1]}, ..., {done[-1]}"
