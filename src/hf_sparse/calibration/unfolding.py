"""How large what a file holds may become: a small file fills neither the memory nor the disk."""

from __future__ import annotations

import mmap
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]
from fsspec.utils import infer_compression  # type: ignore[import-untyped]

from ..core.errors import CalibrationError

# Text compresses by 3 to 20; what is made of it takes a few times its size in memory.
SMALLEST_LIMIT = 32 << 20
FACTOR = 50
_BLOCK = 1 << 20


@dataclass(frozen=True)
class UnfoldingLimit:
    """What one thing that is made of a file may take.

    Attributes:
        name: the file's.
        size: bytes: 32 MiB, or 50 times the file's own size if that is more.
    """

    name: str
    size: int

    @classmethod
    def of(cls, path: Path) -> UnfoldingLimit:
        return cls(path.name, max(SMALLEST_LIMIT, FACTOR * path.stat().st_size))

    def check(self, size: int, what: str) -> None:
        """Raise a CalibrationError if `what` takes more bytes than the limit."""
        if size > self.size:
            raise CalibrationError(
                f"{self.name}: {what} would take {size >> 20} MiB or more, over the limit of "
                f"{self.size >> 20} MiB ({SMALLEST_LIMIT >> 20} MiB, or {FACTOR} times the file's "
                "size): if the data are right, cut them into smaller texts or rows, in a file that "
                "is not compressed"
            )


def mapped(path: Path, compressed: bool, limit: UnfoldingLimit) -> mmap.mmap | bytes:
    """What a file holds, mapped; of a compressed one from a file without a name, which is gone
    when nothing needs it.

    Raises:
        CalibrationError: it unfolds to more than its limit, or what unfolds it isn't installed.
        OSError, EOFError, lzma.LZMAError, zlib.error: it can't be read.
    """
    if not compressed:
        with path.open("rb") as file:
            return _map(file)
    if infer_compression(path.name) is None:  # the others are Python's own
        raise CalibrationError(
            f"{path.name} can't be read without the package zstandard: pip install zstandard"
        )
    with (
        LocalFileSystem().open(str(path.absolute()), "rb", compression="infer") as packed,
        tempfile.TemporaryFile() as file,
    ):
        while block := packed.read(_BLOCK):
            limit.check(file.tell() + len(block), "what it unfolds to")
            file.write(block)
        file.flush()
        return _map(file)


def _map(file: object) -> mmap.mmap | bytes:
    number = file.fileno()  # type: ignore[attr-defined]
    return mmap.mmap(number, 0, access=mmap.ACCESS_READ) if file.seek(0, 2) else b""  # type: ignore[attr-defined]
