"""transformers' logger and progress bars, so that its verbosity settings rule this package too."""

from __future__ import annotations

import logging
from typing import Any

from transformers.utils import logging as transformers_logging


def get_logger(name: str) -> logging.Logger:
    """A logger below transformers' own: `transformers.logging.set_verbosity_*` applies to it."""
    transformers_logging.get_logger()  # installs the library's handler and level on first use
    return logging.getLogger(f"transformers.{name}")


def progress_bar(total: int, description: str, shown: bool = True) -> Any:
    """A tqdm bar that `transformers.logging.disable_progress_bar()` silences."""
    return transformers_logging.tqdm(total=total, desc=description, disable=not shown)
