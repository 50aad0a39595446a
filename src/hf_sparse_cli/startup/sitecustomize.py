"""Imported by Python itself when it starts; see `hf_sparse_cli.startup`."""

import importlib.machinery
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any


class AfterTransformers(MetaPathFinder):
    """Has hf_sparse imported right after transformers: not before, programs that don't use it
    needn't wait for it."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        """The spec that the other finders give for transformers, with hf_sparse behind it."""
        if fullname != "transformers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def then_register(module: Any) -> None:
            execute(module)
            import hf_sparse  # noqa: F401

        spec.loader.exec_module = then_register  # type: ignore[method-assign]
        return spec


def import_hidden() -> None:
    """Import the `sitecustomize` that Python would have found without this one, if there is one."""
    elsewhere = [entry for entry in sys.path if entry != str(Path(__file__).parent)]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


sys.meta_path.insert(0, AfterTransformers())
import_hidden()
