"""A model whose pruning broke off: it says so, and can't be saved, run or pruned again.

Some of its blocks are sparse and others are not, and what a run needed to go on is gone. Keeping
every dense weight to go back to would take the memory of a second model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

from torch import nn

from ..core.errors import ConfigError, SaveError, SolveError

_MARK = "_pruning_broke_off"
_REFUSED = {
    "forward": SolveError,
    "generate": SolveError,
    "save_pretrained": SaveError,
    "push_to_hub": SaveError,
}


def mark_half_pruned(
    model: nn.Module, error: BaseException, done: Sequence[str], total: int
) -> None:
    """Let a model refuse what it can't do any more, and say so in the error that was the reason.

    Args:
        model: the model.
        error: why pruning broke off; its message gets a sentence more.
        done: names of the blocks that are pruned.
        total: how many blocks there are.
    """
    text = (
        f"pruning broke off when {len(done)} of {total} blocks were done"
        f"{' (' + _names(done) + ')' if done else ''}, so that {type(model).__name__} is half "
        "pruned and can't be saved, run or pruned again: load the dense model anew"
    )
    error.args = (f"{error}; {text}" if str(error) else text,)
    setattr(model, _MARK, text)
    for name, kind in _REFUSED.items():
        if hasattr(model, name):
            setattr(model, name, partial(_refuse, kind, text))


@contextmanager
def refused_if_broken(model: nn.Module, total: int) -> Iterator[None]:
    """For a model that has been changed already: any exception leaves it half pruned.

    Args:
        model: the model.
        total: how many blocks are to be pruned.
    """
    try:
        yield
    except BaseException as error:
        if not hasattr(model, _MARK):
            mark_half_pruned(model, error, (), total)
        raise


def check_not_half_pruned(model: nn.Module) -> None:
    """Raise a ConfigError if pruning broke off in a model."""
    text = getattr(model, _MARK, None)
    if text is not None:
        raise ConfigError(text)


def _refuse(kind: type[Exception], text: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise kind(text)


def _names(done: Sequence[str]) -> str:
    return ", ".join(done) if len(done) <= 4 else f"{done[0]}, {done[1]}, ..., {done[-1]}"
