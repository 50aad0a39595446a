"""Products of codes and rounded activations, against float64."""

from __future__ import annotations

import pytest
import torch
from cases import in_one_test
from hypothesis import given
from hypothesis import strategies as st
from test_integer_weight import KINDS, codes_of, scales_of
from tile_weights import FLOATS, PATHS, ROUNDING, many
from torch import Tensor

from hf_sparse.kernels.cpu.integer.weight import pack
from hf_sparse.kernels.cpu.product import packed_linear


def steps_of(x: Tensor, block: int) -> Tensor:
    """The step that each x is rounded with."""
    steps = torch.empty(x.shape, dtype=torch.float64)
    for first in range(0, x.shape[1], block):
        part = x[:, first : first + block].double()
        steps[:, first : first + block] = part.abs().amax(dim=1, keepdim=True) / 127
    return steps


@many
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 300),
    m=st.integers(1, 9),
    kind=st.sampled_from(KINDS),
    top=st.sampled_from([7, 127]),
    group=st.sampled_from([(8, 8), (24, 8), (64, 32), (128, 32), (384, 32), (1 << 62, 32)]),
    dtype=st.sampled_from(FLOATS),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_error_is_that_of_rounding_x(
    n: int, k: int, m: int, kind: str, top: int, group: tuple[int, int], dtype: torch.dtype,
    with_bias: bool, seed: int,
) -> None:  # fmt: skip
    """And that of sums in fp32, and of y's dtype."""
    size, block = group if group[0] < k else (group[0], 32)
    weight = pack(codes_of(kind, n, k, top, seed), scales_of(n, k, size), size)
    dense = weight.dense(torch.float64)
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(m, k, generator=g) * torch.rand(m, 1, generator=g) * 8).to(dtype)
    bias = torch.randn(n, generator=g).to(dtype) if with_bias else None
    expected = x.double() @ dense.T + (0 if bias is None else bias.double())
    allowed = 0.5001 * steps_of(x, block) @ dense.abs().T + 1.01 * ROUNDING[dtype] * expected.abs()
    allowed += 2.0**-23 * (k**0.5 + 4) * (x.double().abs() @ dense.abs().T + 1)
    for path in PATHS:
        y = packed_linear(x, weight, bias, path)
        assert y.dtype == dtype
        assert ((y.double() - expected).abs() <= allowed).all(), path


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
@in_one_test(top=[7, 127], m=[1, 7])
def test_inputs_that_are_multiples_of_their_step_are_multiplied_exactly(path, kind, top, m):
    g = torch.Generator().manual_seed(1)
    x = torch.randint(-127, 128, (m, 300), generator=g).float()
    x[:, ::32] = 127
    codes = codes_of(kind, 20, 300, top, 0)
    y = packed_linear(x, pack(codes, torch.ones(20, 1), 300), path=path)
    assert torch.equal(y, (x.double() @ codes.double().T).float())


@pytest.mark.parametrize("path", PATHS)
def test_the_largest_sums_do_not_overflow(path):
    for code, bits in ((-128, 8), (127, 8), (-8, 4), (7, 4)):
        codes = torch.full((8, 512), code, dtype=torch.int8)
        weight = pack(codes, torch.ones(8, 1), 512)
        assert weight.bits == bits
        for sign in (127.0, -127.0):
            y = packed_linear(torch.full((2, 512), sign), weight, path=path)
            assert torch.equal(y, torch.full((2, 8), sign * code * 512))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_makes_its_token_s_outputs_nan_and_no_other_s(path, bad):
    weight = pack(codes_of("unstructured", 20, 300, 7, 0), scales_of(20, 300, 128), 128)
    x = torch.randn(3, 300)
    right = packed_linear(x, weight, path=path)
    x[1, 7] = bad
    y = packed_linear(x, weight, path=path)
    assert y[1].isnan().all()
    assert torch.equal(y[::2], right[::2])


@pytest.mark.parametrize("path", PATHS)
def test_zeros_and_the_smallest_numbers_give_what_is_nearest(path):
    weight = pack(codes_of("all", 9, 130, 127, 0), torch.ones(9, 1), 130)
    for tiny in (0.0, 1e-45, 1e-38, 1e-31):
        y = packed_linear(torch.full((2, 130), tiny), weight, path=path)
        assert (y.abs() <= 1.1 * tiny * 130 * 128 + 1e-30).all()


@pytest.mark.parametrize("m", [1, 5, 40])
def test_results_do_not_depend_on_threads_or_on_other_tokens(m):
    weight = pack(codes_of("4:8", 700, 600, 7, 0), scales_of(700, 600, 128), 128)
    x, before = torch.randn(m, 600), torch.get_num_threads()
    expected = packed_linear(x, weight)
    try:
        torch.set_num_threads(3)
        assert torch.equal(packed_linear(x, weight), expected)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.cat([packed_linear(row, weight)[None] for row in x]), expected)


def test_the_instruction_sets_agree_to_the_last_bit():
    weight = pack(codes_of("unstructured", 100, 520, 127, 0), scales_of(100, 520, 128), 128)
    x = torch.randn(6, 520)
    first, *others = (packed_linear(x, weight, path=path) for path in PATHS if path != "scalar")
    assert all(torch.equal(first, other) for other in others)


def test_a_width_that_does_not_fit_is_refused():
    weight = pack(codes_of("all", 9, 20, 7, 0), scales_of(9, 20, 20), 20)
    for x, words in ((torch.ones(2, 19), "expected"), (torch.ones(()), "expected")):
        with pytest.raises(ValueError, match=words):
            packed_linear(x, weight)
    with pytest.raises(ValueError, match="bias has shape"):
        packed_linear(torch.ones(2, 20), weight, torch.ones(8))
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        packed_linear(torch.ones(2, 20).double(), weight)
