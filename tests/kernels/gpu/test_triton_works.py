"""Whether Triton runs: its interpreter does here; a compiler that is missing is told."""

import logging

import pytest
import torch

from hf_sparse.kernels.gpu import triton_works

pytest.importorskip("triton")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(autouse=True)
def _anew():
    triton_works.obstacle.cache_clear()
    yield
    triton_works.obstacle.cache_clear()


def test_where_triton_runs_nothing_is_in_the_way():
    assert triton_works.obstacle(DEVICE) is None


def test_what_keeps_triton_from_running_is_asked_once_logged_and_told(monkeypatch, caplog):
    from hf_sparse.kernels.gpu import triton_product

    calls = []

    def product(x, weight):
        calls.append(x)
        raise RuntimeError("Failed to find C compiler.\nPlease specify")

    monkeypatch.setattr(triton_product, "product", product)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    expected = "triton doesn't run here: RuntimeError: Failed to find C compiler."
    assert triton_works.obstacle(DEVICE) == triton_works.obstacle(DEVICE) == expected
    assert len(calls) == 1
    assert f"triton's kernels don't run on {DEVICE} and are left out" in caplog.text


def test_a_wrong_product_is_no_way_to_go(monkeypatch):
    from hf_sparse.kernels.gpu import triton_product

    monkeypatch.setattr(triton_product, "product", lambda x, weight: x.sum() + 1)
    assert "product of ones is wrong" in triton_works.obstacle(DEVICE)
