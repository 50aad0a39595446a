"""What a process holds resident of memory that it has freed."""

import platform
from pathlib import Path

import pytest
import torch

from hf_sparse.core.freed_memory import freed_memory_returned

MB = 1_000_000

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are"
)


def resident() -> int:
    """Bytes of this process that lie in no file."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in x)
    return int(line.split()[1]) << 10


def test_small_arrays_that_were_freed_below_one_that_stays_can_be_given_back():
    with freed_memory_returned() as give_back:
        held = [torch.ones(16_000) for _ in range(1000)]  # 64 MB
        del held[:-1]
        before = resident()
        give_back()
        assert resident() < before - 50 * MB
    del held


def test_large_arrays_are_given_back_when_they_are_freed_whatever_was_freed_before():
    torch.ones(7_500_000)  # 30 MB: once it is freed, glibc takes no smaller array for large
    with freed_memory_returned():
        held = [torch.ones(7_000_000) for _ in range(8)]  # holes in the heap may take some
        before = resident()
        del held[:-1]
        assert resident() < before - 100 * MB
    del held
