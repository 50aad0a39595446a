"""transformers' logger and progress bars, so that its verbosity settings rule this package too."""

from __future__ import annotations

import io
import logging
import sys
from typing import Any

from transformers.utils import logging as transformers_logging


def get_logger(name: str) -> logging.Logger:
    """A logger below transformers' own: `transformers.logging.set_verbosity_*` applies to it."""
    transformers_logging.get_logger()  # installs the library's handler and level on first use
    return logging.getLogger(f"transformers.{name}")


def has_terminal() -> bool:
    """Can a bar be drawn over and over on stderr, or in a notebook?"""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def shows_progress() -> bool:
    """Not if bars are disabled, in transformers or for tqdm, or only errors are to be told."""
    logger = get_logger(__name__)
    with transformers_logging.tqdm(total=1, file=io.StringIO()) as bar:
        return logger.isEnabledFor(logging.WARNING) and bar.disable is False


def progress_bar(
    total: float, description: str, shown: bool = True, bar_format: str | None = None
) -> Any:
    """A tqdm bar that is there if progress is shown; its time left goes by the mean speed."""
    disabled = not (shown and shows_progress())
    return transformers_logging.tqdm(
        total=total, desc=description, disable=disabled, bar_format=bar_format, smoothing=0
    )
