"""Hooks that are there for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """While this lasts the hooks of these handles are registered; then they are removed."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield
