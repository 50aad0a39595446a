"""Something that is no model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hf_sparse
from hf_sparse import SparseConfig

CONFIG = SparseConfig(method="magnitude", sparsity=0.5)
TAKERS: dict[str, Callable[[Any, Path], object]] = {
    "prune": lambda model, folder: hf_sparse.prune(model, CONFIG),
    "explain": lambda model, folder: hf_sparse.explain(model),
    "prefer": lambda model, folder: hf_sparse.prefer(model, "memory"),
    "round_activations": lambda model, folder: hf_sparse.round_activations(model, "int8"),
    "export_dense": lambda model, folder: hf_sparse.export_dense(model, folder),
    "split_low_rank": lambda model, folder: hf_sparse.split_low_rank(model),
    "export_low_rank": lambda model, folder: hf_sparse.export_low_rank(model, folder),
}


@pytest.mark.parametrize("taker", TAKERS)
def test_what_is_no_model_is_named(taker: str, tmp_path: Path) -> None:
    for model in ("gpt2", None):
        with pytest.raises(hf_sparse.ConfigError, match=f"found {model!r}: load one with"):
            TAKERS[taker](model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", [None, 3])
def test_what_is_no_folder_or_id_is_named(model: object) -> None:
    with pytest.raises(hf_sparse.ConfigError, match=f"id on the Hub is needed, found {model!r}"):
        hf_sparse.estimate(model, CONFIG)  # type: ignore[arg-type]
