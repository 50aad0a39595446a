"""Memory that is freed goes back to the system, where glibc alone would keep it.

glibc takes a large array from the system by itself and gives it back when it is freed. But each
time it does so it raises the size that it takes for large, up to 32 MiB, and cuts what is smaller
out of one heap. There a few arrays that stay leave holes that the next ones don't fit in, and a
process that works on one block of a model after the other grows with each.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Of malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# Bytes from which an array is a large one: above the temporaries of a few rows, which come and go
# at a rate at which new pages would cost time. And where glibc's own rule ends.
_LARGE, _LARGEST = 2 << 20, 32 << 20


@contextmanager
def freed_memory_returned() -> Iterator[Callable[[], object]]:
    """While this lasts, large arrays are given back when they are freed.

    Yields:
        What gives back the rest that is free, in some milliseconds: call it now and then. Nothing
        is done where the C library isn't glibc.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is None or not hasattr(library, "malloc_trim"):
        yield lambda: None
        return
    _set_large(library, _LARGE)
    library.malloc_trim(0)  # what is free in the heap would be taken first
    try:
        yield lambda: library.malloc_trim(0)
    finally:
        _set_large(library, _LARGEST)


def _set_large(library: ctypes.CDLL, size: int) -> None:
    library.mallopt(_MMAP_THRESHOLD, size)
    library.mallopt(_TRIM_THRESHOLD, 2 * size)  # as glibc pairs them
