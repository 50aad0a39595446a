"""The `hf-sparse` command line.

A package beside hf_sparse, because importing hf_sparse registers its quantisation method, which
loads torch and transformers: help, completion and `inspect` must not wait for them. Commands import
them when they run.
"""

from .app import main

__all__ = ["main"]
