"""One token times a dense weight, against float64 on every path, and as a torch operator."""

import pytest
import torch
import torch.nn.functional as F
from cases import in_one_test

from hf_sparse.kernels.cpu import dense_row, library
from hf_sparse.kernels.timing import SWITCH

HALVES = [torch.bfloat16, torch.float16]
# Half a unit in the last place of the output, and what fp32 sums lose on top.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_close(y, x, weight):
    expected = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    allowed = 1.01 * ROUNDING[y.dtype] * expected.abs() + 2.0**-22 * size
    assert bool(((y.double() - expected).abs() <= allowed).all())


@pytest.mark.parametrize("path", library.paths())
@pytest.mark.parametrize("dtype", HALVES)
@in_one_test(x_dtype=ROUNDING, shape=[(1, 1), (5, 3), (7, 64), (4, 200), (33, 131), (130, 300)])
def test_one_token_agrees_with_float64_on_every_path(path, dtype, x_dtype, shape):
    weight, x = normal(*shape).to(dtype), normal(1, shape[1], seed=1).to(x_dtype)
    assert_close(dense_row.product(x, weight, path=path), x, weight)
    wide = normal(shape[0], shape[1] + 3).to(dtype)[:, : shape[1]]  # rows that lie apart
    assert_close(dense_row.product(x, wide, path=path), x, wide)


@pytest.mark.parametrize("path", library.paths())
def test_infinities_and_nans_come_out_as_of_linear(path):
    x = normal(1, 40).bfloat16()
    weight = normal(4, 40).bfloat16()
    weight[0, 3], weight[1, 39], weight[2, 5] = torch.nan, torch.inf, 0
    x[0, 5] = torch.inf
    y, expected = dense_row.product(x, weight, path=path), F.linear(x, weight)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())


def test_threads_do_not_change_a_bit():
    weight, x = normal(3001, 200).bfloat16(), normal(1, 200).bfloat16()
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(dense_row.product(x, weight))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_wrong_arguments_are_named():
    weight, x = normal(4, 8).bfloat16(), normal(1, 8).bfloat16()
    with pytest.raises(TypeError, match=r"weight is torch\.float32"):
        dense_row.product(x, weight.float())
    with pytest.raises(ValueError, match="one row of 8"):
        dense_row.product(normal(2, 8).bfloat16(), weight)
    with pytest.raises(ValueError, match="contiguous rows"):
        dense_row.product(normal(1, 4).bfloat16(), weight.T)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_operator_keeps_torch_s_rules_and_has_gradients():
    x, weight = (t.bfloat16().requires_grad_() for t in (normal(1, 36), normal(20, 36)))
    torch.library.opcheck(dense_row.dense_row, (x, weight))
    upstream = normal(1, 20).bfloat16()
    (dense_row.dense_row(x, weight) * upstream).sum().backward()
    other, dense = (t.detach().double().requires_grad_() for t in (x, weight))
    (F.linear(other, dense) * upstream.double()).sum().backward()
    torch.testing.assert_close(x.grad.double(), other.grad, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(weight.grad.double(), dense.grad, rtol=2e-2, atol=2e-2)


def test_the_measurement_is_kept_and_can_be_switched_off(monkeypatch, tmp_path):
    weight = normal(64, 32).bfloat16()
    assert dense_row.over_dense(weight) is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(SWITCH, "1")
    first = dense_row.over_dense(weight)
    assert first > 0
    monkeypatch.setattr(dense_row, "_measure", lambda w, t: pytest.fail("it was measured before"))
    assert dense_row.over_dense(weight) == first
    monkeypatch.setattr(library, "_load", lambda: "no library")
    assert dense_row.over_dense(weight) is None
