"""Products in fp32 in place of slow ones in 16 bits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_sparse.kernels import timing
from hf_sparse.kernels.cpu import wide


@pytest.fixture
def slow(monkeypatch):
    """A machine on which products in 16 bits are slow."""
    monkeypatch.setattr(wide, "pays", lambda dtype: dtype in wide.HALVES)
    monkeypatch.setattr(wide, "BLOCK_BYTES", 4 * 64 * 10)  # ten rows of 64


class Products(nn.Module):
    """Every product that is widened, by its name."""

    def __init__(self, dtype):
        super().__init__()
        self.layer = nn.Linear(64, 37, dtype=dtype)
        self.plain = nn.Linear(64, 37, bias=False, dtype=dtype)

    def forward(self, x):
        w = self.plain.weight
        return {
            "linear": self.layer(x),
            "no bias": F.linear(x, w),
            "matmul": torch.matmul(x, w.T),
            "operator": x @ w.mT,
            "bmm": torch.bmm(x, w.T.expand(len(x), -1, -1)),
            "mm": torch.mm(x[0], w.T),
            "addmm": torch.addmm(self.layer.bias, x[0], w.T),
        }


@pytest.mark.parametrize("dtype", wide.HALVES)
def test_products_are_those_of_fp32_rounded_once(slow, dtype):
    torch.manual_seed(0)
    model, x = Products(dtype), torch.randn(2, 9, 64).to(dtype)
    exact = Products(torch.float64)
    exact.load_state_dict(model.state_dict())
    with torch.no_grad(), wide.wide_products(model):
        found = model(x)
    with torch.no_grad():
        expected = exact(x.double())
        own = model(x)
    for name, product in found.items():
        assert product.dtype == dtype
        # one rounding, of a sum in fp32
        step = torch.finfo(dtype).eps / 2
        torch.testing.assert_close(product.double(), expected[name], rtol=step * 1.01, atol=1e-5)
        assert (product == own[name]).double().mean() > 0.98


def test_few_tokens_other_dtypes_and_other_machines_are_left_alone(slow, monkeypatch):
    calls = []
    monkeypatch.setattr(wide, "_WIDE", {F.linear: lambda *args: calls.append(args) or args[0]})
    model = nn.Linear(64, 64).bfloat16()
    with wide.wide_products(model):
        model(torch.randn(3, 64).bfloat16())
        F.linear(torch.randn(9, 64), torch.randn(64, 64))
        assert calls == []
        model(torch.randn(9, 64).bfloat16())
        assert len(calls) == 1
    monkeypatch.setattr(wide, "pays", lambda dtype: False)
    with wide.wide_products(model):
        model(torch.randn(9, 64).bfloat16())
    assert len(calls) == 1


def test_gradients_go_through(slow):
    torch.manual_seed(0)
    model, x = nn.Linear(64, 37).bfloat16(), torch.randn(9, 64).bfloat16().requires_grad_()
    with wide.wide_products(model):
        model(x).float().square().sum().backward()
    found, x.grad = x.grad, None
    model(x).float().square().sum().backward()
    torch.testing.assert_close(found, x.grad, rtol=0.02, atol=0.05)


@pytest.mark.parametrize(("own", "expected"), [(5.0, True), (1.2, False), (None, False)])
def test_whether_it_pays_is_measured_and_remembered(monkeypatch, tmp_path, own, expected):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured = []

    def measure(dtype):
        measured.append(dtype)
        return own and {"wide": 1.0, "own": own}

    monkeypatch.setattr(wide, "_measure", measure)
    wide._faster.cache_clear()
    assert not wide.pays(torch.bfloat16)  # switched off
    monkeypatch.setenv(timing.SWITCH, "1")
    assert [wide.pays(torch.bfloat16) for _ in range(2)] == [expected] * 2
    assert len(measured) == 1
    assert not wide.pays(torch.float32)
    wide._faster.cache_clear()  # as in another process
    assert wide.pays(torch.bfloat16) == expected
    assert len(measured) == (1 if own else 2)
    wide._faster.cache_clear()
