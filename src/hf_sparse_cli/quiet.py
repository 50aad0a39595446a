"""`--quiet`: nothing on stderr but errors."""

import os
import warnings

# What transformers, the Hub's client, tqdm and Python in other processes read when they start.
SETTINGS = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "PYTHONWARNINGS": "ignore",
}


def be_quiet() -> None:
    """Silence progress bars, notes and warnings of what this process has not imported yet."""
    os.environ.update(SETTINGS)
    warnings.simplefilter("ignore")


def is_quiet() -> bool:
    """Is it so, here or in the process that started this one?"""
    return SETTINGS.items() <= os.environ.items()
