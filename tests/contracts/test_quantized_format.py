"""Codes in every layout: what is kept, what a file looks like, and what is refused."""

import json
import math
import re

import pytest
import torch
from cases import in_one_test
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparse.core.errors import ConfigError, FormatError
from hf_sparse.core.grids import Grid, QuantizedWeight, Scales
from hf_sparse.core.patterns import NM, Unstructured
from hf_sparse.formats import FORMATS, Accepted, Quantized, choose_format, format_from_spec
from hf_sparse.formats.base import check_packed, packed_bytes

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True, database=None)
SHAPES = [(1, 1), (1, 3), (5, 4), (4, 13), (3, 130)]
GRIDS = [
    Grid(bits, size, sym) for bits in (8, 4, 3) for size in (None, 5, 128) for sym in (True, False)
]
every_layout = pytest.mark.parametrize("name", FORMATS)
every_shape = in_one_test(shape=SHAPES)
every_grid = pytest.mark.parametrize(
    "grid", GRIDS, ids=lambda g: f"{g.bits}-{g.group_size}-{'sym' if g.sym else 'asym'}"
)


def make_codes(shape, grid, seed=0) -> QuantizedWeight:
    """Random codes over the whole range of each group, 2 of 4 kept, which every layout takes."""
    generator = torch.Generator().manual_seed(seed)
    groups = (shape[0], -(-shape[1] // (grid.group_size or shape[1])))
    scale = torch.rand(groups, generator=generator).bfloat16().float() + 0.5
    half = 2 ** (grid.bits - 1)
    if grid.sym:
        zero, low, high = None, -half + 1, half - 1
    else:
        zero = torch.randint(0, 2 * half, groups, generator=generator).to(torch.int16)
        low = -zero.repeat_interleave(grid.group_size or shape[1], 1)[:, : shape[1]]
        high = low + 2 * half - 1
    codes = torch.rand(shape, generator=generator) * (high - low + 1) + low
    codes = codes.floor().to(torch.int16)
    codes[:, 0::4] = 0
    codes[:, 3::4] = 0
    return QuantizedWeight(codes, Scales(grid, scale.bfloat16().float(), zero))


def format_of(name, weight) -> Quantized:
    fmt = choose_format(weight, NM(2, 4), name)
    assert isinstance(fmt, Quantized)
    assert fmt.layout.name == name
    return fmt


FOUR_BITS = Grid(4, 5, True)


def packed_case(name, grid=FOUR_BITS, shape=(4, 13)):
    weight = make_codes(shape, grid)
    fmt = format_of(name, weight)
    return fmt, fmt.pack(weight), weight


def assert_refused(fmt, tensors, shape, *names):
    with pytest.raises(FormatError) as caught:
        check_packed(fmt, tensors, shape)
    for name in names:
        assert re.search(rf"{re.escape(name)}(?!\d)", str(caught.value)), str(caught.value)


# --- what packing keeps ---------------------------------------------------------------------


@every_layout
@every_shape
@every_grid
def test_codes_scales_and_zero_points_come_back_exactly(name, shape, grid):
    weight = make_codes(shape, grid)
    before = weight.codes.clone()
    fmt = format_of(name, weight)
    packed = fmt.pack(weight)
    check_packed(fmt, packed, shape)
    again = fmt.quantized(packed, shape)
    assert torch.equal(again.codes, before)
    assert torch.equal(weight.codes, before)
    assert torch.equal(again.scales.scale, weight.scales.scale)
    assert again.scales.grid == grid
    if not grid.sym:
        assert torch.equal(again.scales.zero, weight.scales.zero)
    for key, tensor in fmt.pack(again).items():
        assert torch.equal(tensor, packed[key])


@every_layout
@every_grid
@in_one_test(dtype=[torch.float32, torch.bfloat16, torch.float16])
def test_unpacking_gives_code_times_scale_in_the_dtype_that_is_asked_for(name, grid, dtype):
    fmt, packed, weight = packed_case(name, grid)
    unpacked = fmt.unpack(packed, (4, 13), dtype)
    size = grid.group_size or 13
    for i in range(4):
        for j in range(13):
            value = int(weight.codes[i, j]) * float(weight.scales.scale[i, j // size])
            assert unpacked[i, j] == torch.tensor(value, dtype=torch.float64).to(dtype)


@every_layout
@every_grid
def test_a_kept_weight_with_code_zero_is_zero_whatever_the_zero_point(name, grid):
    weight = make_codes((4, 13), grid)
    weight.codes[2] = 0
    fmt = format_of(name, weight)
    packed = fmt.pack(weight)
    check_packed(fmt, packed, (4, 13))
    assert torch.equal(fmt.quantized(packed, (4, 13)).codes, weight.codes)
    if name == "bitmask":
        assert not bool(packed["weight_bitmask"][2].any())


@every_layout
@every_shape
@every_grid
def test_the_specs_describe_the_tensors(name, shape, grid):
    fmt, packed, _ = packed_case(name, grid, shape)
    specs = fmt.specs(shape)
    assert set(specs) == set(packed)
    assert ("weight_zeros" in specs) == (not grid.sym)
    for key, spec in specs.items():
        assert packed[key].dtype == spec.dtype
        assert packed[key].is_contiguous()
        for want, size in zip(spec.shape, packed[key].shape, strict=True):
            assert want in (None, size)


@SETTINGS
@given(
    st.sampled_from(list(FORMATS)),
    st.tuples(st.integers(1, 5), st.integers(1, 41)),
    st.sampled_from([8, 4, 3]),
    st.sampled_from([None, 1, 3, 16]),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_any_codes_survive_packing(name, shape, bits, size, sym, seed):
    weight = make_codes(shape, Grid(bits, size, sym), seed)
    fmt = format_of(name, weight)
    packed = fmt.pack(weight)
    check_packed(fmt, packed, shape)
    assert torch.equal(fmt.quantized(packed, shape).codes, weight.codes)


# --- choosing -------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.0), NM(2, 4)], ids=str)
@every_grid
def test_auto_takes_the_smallest_layout(pattern, grid):
    dense = torch.randn(6, 130, generator=torch.Generator().manual_seed(0))
    dense = dense.where(pattern.mask(dense.abs()), 0)
    weight = grid.fit(dense).round(dense)
    sizes = {}
    for name, cls in FORMATS.items():
        verdict = cls.fits(weight.codes, pattern, grid.bits)
        if isinstance(verdict, Accepted):
            sizes[name] = packed_bytes(Quantized(grid, verdict.format).pack(weight))
    chosen = choose_format(weight, pattern, "auto")
    assert isinstance(chosen, Quantized)
    assert sizes[chosen.layout.name] == min(sizes.values())


def test_a_layout_that_can_not_hold_the_codes_is_an_error():
    dense = torch.ones(2, 64)
    weight = Grid(4, 32, True).fit(dense).round(dense)
    with pytest.raises(ConfigError, match=r"format='n:m' can't hold this weight: .*bitmask"):
        choose_format(weight, Unstructured(0.5), "n:m")


@pytest.mark.parametrize(("bits", "share"), [(8, 0.33), (4, 0.22), (3, 0.18)])
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4), NM(4, 8)], ids=str)
def test_half_of_the_weights_on_a_grid_take_this_share_of_dense_bf16(bits, share, pattern):
    dense = torch.randn(704, 256, generator=torch.Generator().manual_seed(0))
    dense = dense.where(pattern.mask(dense.abs()), 0)
    weight = Grid(bits, 128, True).fit(dense).round(dense)
    fmt = choose_format(weight, pattern, "auto")
    assert packed_bytes(fmt.pack(weight)) <= share * 2 * dense.numel()


# --- parameters -----------------------------------------------------------------------------


@every_layout
@every_grid
def test_a_format_is_rebuilt_from_its_parameters_as_json(name, grid):
    fmt, _, _ = packed_case(name, grid)
    spec = json.loads(json.dumps({"format": fmt.name, **fmt.parameters()}))
    assert format_from_spec(spec) == fmt
    hash(fmt)


GOOD = {"bits": 4, "group_size": 128, "sym": True, "layout": {"format": "bitmask"}}


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 5},
        {"bits": 4.0},
        {"bits": True},
        {"bits": "4"},
        {"group_size": 0},
        {"group_size": -1},
        {"group_size": 2**31},
        {"group_size": "128"},
        {"group_size": True},
        {"sym": 1},
        {"sym": None},
        {"layout": None},
        {"layout": "bitmask"},
        {"layout": {"format": "zip"}},
        {"layout": {"format": ["bitmask"]}},
        {"layout": {**GOOD, "format": "quantized"}},
        {"layout": {"format": "n:m", "n": 4, "m": 4}},
        {"zstd": 3},
    ],
    ids=str,
)
def test_parameters_out_of_range_are_refused(change):
    format_from_spec({"format": "quantized", **GOOD})
    with pytest.raises(FormatError):
        format_from_spec({"format": "quantized", **GOOD, **change})


@pytest.mark.parametrize("key", GOOD)
def test_a_missing_parameter_is_refused(key):
    with pytest.raises(FormatError):
        format_from_spec({"format": "quantized", **{k: v for k, v in GOOD.items() if k != key}})


# --- tampering ------------------------------------------------------------------------------


def tensor_cases():
    grid = Grid(4, 5, False)
    return [(name, key) for name in FORMATS for key in packed_case(name, grid)[1]]


every_tensor = pytest.mark.parametrize(("name", "key"), tensor_cases(), ids=str)


@every_tensor
def test_a_missing_tensor_is_named(name, key):
    fmt, packed, _ = packed_case(name, Grid(4, 5, False))
    del packed[key]
    assert_refused(fmt, packed, (4, 13), key, "missing")


@every_tensor
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.int8], ids=str)
def test_a_tensor_of_another_dtype_is_named(name, key, dtype):
    fmt, packed, _ = packed_case(name, Grid(4, 5, False))
    packed[key] = packed[key].to(dtype)
    assert_refused(fmt, packed, (4, 13), key, "dtype")


@every_tensor
@pytest.mark.parametrize("change", ["shorter", "longer"])
def test_a_tensor_of_another_size_is_named(name, key, change):
    fmt, packed, _ = packed_case(name, Grid(4, 5, False))
    tensor = packed[key]
    packed[key] = tensor[:-1] if change == "shorter" else torch.cat([tensor, tensor[-1:]])
    assert_refused(fmt, packed, (4, 13), key)


@every_layout
def test_zero_points_without_asymmetry_do_not_belong(name):
    fmt, packed, _ = packed_case(name)
    packed["weight_zeros"] = torch.zeros(4, 3, dtype=torch.uint8)
    assert_refused(fmt, packed, (4, 13), "weight_zeros")


@every_layout
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_the_lowest_code_of_twos_complement_is_refused_if_symmetric(name, bits):
    fmt, packed, _ = packed_case(name, Grid(bits, 5, True))
    number = 1 << bits - 1
    packed["weight"][0] = packed["weight"][0] & ~((1 << bits) - 1) & 255 | number
    assert_refused(fmt, packed, (4, 13), "weight", str(-number))


@every_layout
@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_scales_that_are_no_scales_are_refused(name, scale):
    fmt, packed, _ = packed_case(name)
    packed["weight_scales"][3, 2] = scale
    assert_refused(fmt, packed, (4, 13), "weight_scales")


@every_layout
@pytest.mark.parametrize("bits", [4, 3])
def test_zero_points_beyond_the_grid_are_refused(name, bits):
    fmt, packed, _ = packed_case(name, Grid(bits, 5, False))
    packed["weight_zeros"][1, 1] = 1 << bits
    assert_refused(fmt, packed, (4, 13), "weight_zeros", str(1 << bits))


@pytest.mark.parametrize("bits", [4, 3])
def test_bits_in_the_padding_of_the_codes_are_refused(bits):
    fmt, packed, _ = packed_case("dense", Grid(bits, 5, True), (1, 13))
    packed["weight"][-1] |= 128
    assert_refused(fmt, packed, (1, 13), "weight")


def test_a_bitmask_that_marks_another_number_of_codes_is_refused():
    fmt, packed, _ = packed_case("bitmask", Grid(8, 5, True))
    packed["weight_bitmask"][0, 0] ^= 1
    assert_refused(fmt, packed, (4, 13), "weight")


def test_an_index_that_no_arrangement_has_is_refused():
    fmt, packed, _ = packed_case("n:m")
    packed["weight_indices"][0, 0] = 0b110
    assert_refused(fmt, packed, (4, 13), "weight_indices")


# --- the layout of a file, by hand ----------------------------------------------------------


def by_hand(codes, grid, zero=None):
    codes = torch.tensor(codes, dtype=torch.int16)
    scale = torch.ones(len(codes), 1)
    return QuantizedWeight(codes, Scales(grid, scale, zero))


def test_the_bytes_of_symmetric_four_bits_are_these():
    weight = by_hand([[0, 5, 0], [-7, 0, 6]], Grid(4, None, True))
    packed = format_of("bitmask", weight).pack(weight)
    # 5, -7 mod 16 = 9, 6; the first in the low half of its byte.
    assert packed["weight"].tolist() == [5 + 9 * 16, 6]
    assert packed["weight_bitmask"].tolist() == [[2], [5]]
    assert packed["weight_scales"].tolist() == [[1], [1]]


def test_the_bytes_of_asymmetric_three_bits_are_these():
    zero = torch.tensor([[6]], dtype=torch.int16)
    weight = by_hand([[-6, -1, 1]], Grid(3, None, False), zero)
    packed = format_of("dense", weight).pack(weight)
    # -6, -1 and 1 mod 8 are 2, 7 and 1.
    stream = 2 + 7 * 8 + 1 * 64
    assert packed["weight"].tolist() == [stream & 255, stream >> 8]
    assert packed["weight_zeros"].tolist() == [[6]]


@every_grid
def test_a_bitmask_file_can_be_read_from_its_description(grid):
    _, packed, weight = packed_case("bitmask", grid, (3, 21))
    bits = [byte >> i & 1 for byte in packed["weight"].tolist() for i in range(8)]
    size, taken = grid.group_size or 21, 0
    for i in range(3):
        for j in range(21):
            value = 0.0
            if packed["weight_bitmask"][i, j // 8] >> (j % 8) & 1:
                number = sum(bits[taken * grid.bits + b] << b for b in range(grid.bits))
                taken += 1
                zero = 2 ** (grid.bits - 1)
                if not grid.sym:
                    zero = int(packed["weight_zeros"][i, j // size])
                code = (number + zero) % 2**grid.bits - zero
                value = code * float(packed["weight_scales"][i, j // size])
            assert float(weight.dequantize()[i, j]) == value
