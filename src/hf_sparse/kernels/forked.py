"""A process that was forked from one whose threads torch had at work: it would wait for them."""

from __future__ import annotations

import os

import torch

from ..core.errors import ConfigError

_without_threads = False


def _note() -> None:
    global _without_threads
    _without_threads = torch.get_num_threads() > 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note)


def check_threads() -> None:
    """Raise a ConfigError where torch would wait for threads that only the parent process has."""
    if _without_threads and torch.get_num_threads() > 1:
        raise ConfigError(
            "this process was forked from one that computes with several threads, which are not in "
            "it, and torch would wait for them forever: call torch.set_num_threads(1) in it first, "
            "as DataLoader's workers do, or start processes with 'spawn'"
        )
