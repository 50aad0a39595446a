"""What every storage format promises; a new one is tested by being registered.

`bitmask` and `n:m` are read here a second time, byte by byte in plain Python, from what their
modules' texts say about the layout.
"""

import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from cases import in_one_test
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from conftest import assert_said
from hf_sparse.core.errors import ConfigError, FormatError
from hf_sparse.core.patterns import NM, Pattern, Unstructured
from hf_sparse.formats import (
    FORMATS,
    Accepted,
    Format,
    Rejected,
    check_format_name,
    choose_format,
    format_from_spec,
)
from hf_sparse.formats.base import check_packed, packed_bytes
from hf_sparse.formats.n_of_m import NMPacked

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True, database=None)
SHAPES = [(1, 1), (1, 3), (5, 4), (3, 8), (4, 13), (2, 33), (7, 64), (3, 130)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# n kept of m; None for any pattern.
GROUPS = [None, (2, 4), (1, 4), (4, 8), (3, 5), (1, 2), (16, 32)]

every_format = pytest.mark.parametrize("name", FORMATS)
every_dtype = in_one_test(dtype=DTYPES)
every_shape = in_one_test(shape=SHAPES)


def make_weight(shape, groups, dtype=torch.float32, seed=0) -> torch.Tensor:
    """Random values; half of them zero, or n kept at random places of every m."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) + 3
    for row, start in itertools.product(range(shape[0]), range(0, shape[1], (groups or (0, 1))[1])):
        width = min((groups or (0, 1))[1], shape[1] - start)
        keep = math.ceil(groups[0] * width / groups[1]) if groups else 0
        if groups is None:
            keep = int(torch.rand(1, generator=generator) < 0.5)
        for gone in torch.randperm(width, generator=generator)[keep:]:
            weight[row, start + int(gone)] = 0
    return weight.to(dtype)


def as_pattern(groups: tuple[int, int] | None) -> Pattern:
    return NM(*groups) if groups else Unstructured(0.5)


def fitting() -> list[tuple[str, tuple[int, int] | None]]:
    """Each format with the patterns whose weights it takes whatever the shape."""
    verdicts = {
        (name, groups): cls.fits(make_weight((3, 130), groups), as_pattern(groups))
        for name, cls in FORMATS.items()
        for groups in GROUPS
    }
    return [key for key, verdict in verdicts.items() if isinstance(verdict, Accepted)]


every_fit = pytest.mark.parametrize(("name", "groups"), fitting(), ids=str)


def accepted(name: str, weight: torch.Tensor, groups: tuple[int, int] | None) -> Accepted:
    verdict = FORMATS[name].fits(weight, as_pattern(groups))
    assert isinstance(verdict, Accepted)
    return verdict


def packed_case(name: str, shape=(4, 13), dtype=torch.float32):
    """A 2:4 weight, which every format takes, packed."""
    weight = make_weight(shape, (2, 4), dtype)
    fmt = accepted(name, weight, (2, 4)).format
    return fmt, fmt.pack(weight), weight


def assert_refused(fmt: Format, tensors, shape, *names: str) -> str:
    with pytest.raises(FormatError) as caught:
        check_packed(fmt, tensors, shape)
    for name in names:
        assert re.search(rf"\b{name}\b", str(caught.value)), str(caught.value)
    return str(caught.value)


# --- what packing keeps ---------------------------------------------------------------------


@every_fit
@every_shape
@every_dtype
def test_unpacking_gives_back_what_was_packed(name, groups, shape, dtype):
    weight = make_weight(shape, groups, dtype)
    before = weight.clone()
    fmt = accepted(name, weight, groups).format
    packed = fmt.pack(weight)
    copies = {key: tensor.clone() for key, tensor in packed.items()}
    unpacked = fmt.unpack(packed, shape, dtype)
    assert unpacked.dtype == dtype
    assert torch.equal(unpacked, before)
    assert torch.equal(weight, before)
    assert all(torch.equal(packed[key], copies[key]) for key in copies)


@every_fit
@every_shape
def test_a_sample_has_a_dense_matrix_s_entries_where_the_weight_is_kept(name, groups, shape):
    verdict = accepted(name, make_weight(shape, groups), groups)
    packed = verdict.format.pack(make_weight(shape, groups))
    # A weight that numbers its entries says where the values belong.
    dense = torch.arange(1.0, shape[0] * shape[1] + 1).view(shape)
    parts = [verdict.format.sample(packed, dense[i : i + 2], i) for i in range(0, shape[0], 2)]
    sampled = torch.cat(parts)
    assert sampled.shape == packed["weight"].shape
    back = verdict.format.unpack({**packed, "weight": sampled}, shape, torch.float32)
    kept = (make_weight(shape, groups) != 0) | (back != 0)
    assert torch.equal(back, dense.where(kept, 0))
    assert int(kept.sum()) == sampled.numel()


@every_fit
@every_shape
@every_dtype
def test_the_bytes_promised_are_the_bytes_taken_and_the_specs_describe_them(
    name, groups, shape, dtype
):
    weight = make_weight(shape, groups, dtype)
    verdict = accepted(name, weight, groups)
    packed = verdict.format.pack(weight)
    real = sum(len(t.contiguous().view(torch.uint8).flatten()) for t in packed.values())
    assert verdict.bytes == real == packed_bytes(packed)
    specs = verdict.format.specs(shape)
    assert set(specs) == set(packed)
    assert packed["weight"].dtype == dtype
    for key, spec in specs.items():
        assert spec.dtype in (packed[key].dtype, None)
        assert len(spec.shape) == packed[key].ndim
        for want, size in zip(spec.shape, packed[key].shape, strict=True):
            assert want in (None, size)
    check_packed(verdict.format, packed, shape)


@every_format
@pytest.mark.parametrize("groups", GROUPS, ids=str)
@every_shape
def test_a_format_takes_a_weight_or_says_why_not(name, groups, shape):
    verdict = FORMATS[name].fits(make_weight(shape, groups), as_pattern(groups))
    if isinstance(verdict, Rejected):
        assert "format='bitmask'" in verdict.reason
    else:
        assert verdict.format.name == name


@SETTINGS
@given(
    st.sampled_from(list(FORMATS)),
    st.tuples(st.integers(1, 5), st.integers(1, 41)),
    st.sampled_from(GROUPS),
    st.sampled_from(DTYPES),
    st.integers(0, 10**6),
)
def test_any_weight_that_is_taken_survives_packing(name, shape, groups, dtype, seed):
    weight = make_weight(shape, groups, dtype, seed)
    verdict = FORMATS[name].fits(weight, as_pattern(groups))
    if isinstance(verdict, Accepted):
        packed = verdict.format.pack(weight)
        check_packed(verdict.format, packed, shape)
        assert torch.equal(verdict.format.unpack(packed, shape, dtype), weight)


@every_fit
def test_a_weight_without_any_non_zero_survives(name, groups):
    weight = torch.zeros(3, 13)
    fmt = accepted(name, weight, groups).format
    packed = fmt.pack(weight)
    check_packed(fmt, packed, (3, 13))
    assert torch.equal(fmt.unpack(packed, (3, 13), torch.float32), weight)


@every_format
@every_dtype
def test_extreme_values_survive_and_a_negative_zero_becomes_zero(name, dtype):
    info = torch.finfo(dtype)
    # 2 of 4, the smallest subnormal among them.
    row = [info.max, 0, 0, info.min, math.inf, -0.0, 0, info.smallest_normal * info.eps]
    weight = torch.tensor([row], dtype=torch.float64).to(dtype)
    assert weight[0, 7] != 0
    fmt = accepted(name, weight, (2, 4)).format
    packed = fmt.pack(weight)
    check_packed(fmt, packed, (1, 8))
    assert torch.equal(fmt.unpack(packed, (1, 8), dtype), weight)


@every_format
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
def test_values_unpacked_to_a_wider_dtype_are_the_same_numbers(name, stored):
    fmt, packed, weight = packed_case(name, dtype=stored)
    unpacked = fmt.unpack(packed, (4, 13), torch.float32)
    assert unpacked.dtype == torch.float32
    assert torch.equal(unpacked, weight.float())


@every_format
def test_a_transposed_view_is_packed_like_its_copy_and_ready_for_a_file(name):
    # Conv1D's weight arrives as a view; safetensors writes contiguous tensors only.
    weight = make_weight((13, 4), (2, 4)).T.contiguous().T
    assert not weight.is_contiguous()
    fmt = accepted(name, weight, (2, 4)).format
    viewed, copied = fmt.pack(weight), fmt.pack(weight.contiguous())
    for key in copied:
        assert torch.equal(viewed[key], copied[key])
        assert viewed[key].is_contiguous()


@every_format
def test_packed_and_dense_tensors_share_no_memory(name):
    fmt, packed, weight = packed_case(name)
    unpacked = fmt.unpack(packed, (4, 13), torch.float32)
    stores = [t.untyped_storage().data_ptr() for t in (weight, unpacked, *packed.values())]
    assert len(set(stores)) == len(stores)


@every_format
def test_the_same_weight_is_packed_to_the_same_bytes(name):
    _, first, _ = packed_case(name)
    _, second, _ = packed_case(name)
    for key, tensor in first.items():
        assert tensor.numpy().tobytes() == second[key].numpy().tobytes()


@every_format
def test_a_check_takes_less_memory_than_what_it_checks(name, tmp_path):
    weight = torch.ones(1024, 4096, dtype=torch.bfloat16)
    weight[:, ::4] = weight[:, 3::4] = 0
    fmt = accepted(name, weight, (2, 4)).format
    packed = fmt.pack(weight)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        check_packed(fmt, packed, (1024, 4096))
    assert most_allocated(profiler, tmp_path / "trace.json") < packed_bytes(packed)


def most_allocated(profiler: profile, trace: Path) -> int:
    """The most bytes that were allocated at one time on top of those at the start."""
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    held = most = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most


# --- parameters and names -------------------------------------------------------------------


@every_fit
def test_a_format_is_rebuilt_from_its_parameters_as_json(name, groups):
    fmt = accepted(name, make_weight((3, 130), groups), groups).format
    parameters = json.loads(json.dumps(fmt.parameters()))
    assert FORMATS[name].from_parameters(parameters) == fmt
    assert format_from_spec({"format": name, **parameters}) == fmt
    hash(fmt)


@every_format
def test_an_unknown_parameter_is_refused_by_name(name):
    fmt, _, _ = packed_case(name)
    with pytest.raises(FormatError, match=re.escape(repr(name))) as caught:
        FORMATS[name].from_parameters({**fmt.parameters(), "zstd": 3})
    assert "zstd" in str(caught.value)


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"n": 2},
        {"m": 4},
        {"n": 0, "m": 4},
        {"n": 4, "m": 4},
        {"n": 5, "m": 4},
        {"n": -1, "m": 4},
        {"n": 2, "m": 33},
        {"n": 2.0, "m": 4},
        {"n": "2", "m": 4},
        {"n": True, "m": 4},
        {"n": None, "m": None},
    ],
    ids=str,
)
def test_parameters_that_are_no_n_of_m_are_refused(parameters):
    with pytest.raises(FormatError, match="expected integers"):
        NMPacked.from_parameters(parameters)


@pytest.mark.parametrize("spec", [{}, {"format": "zip"}, {"format": None}, {"format": ["bitmask"]}])
def test_an_unknown_format_in_a_file_is_refused_with_the_names_that_exist(spec):
    with pytest.raises(FormatError) as caught:
        format_from_spec(spec)
    assert_said(caught, spec.get("format"), FORMATS)


@pytest.mark.parametrize("name", ["zip", "", None, 4])
def test_an_unknown_format_in_a_config_is_refused_with_the_names_that_exist(name):
    with pytest.raises(ConfigError) as caught:
        check_format_name(name)
    assert_said(caught, name, FORMATS)


@pytest.mark.parametrize("groups", GROUPS, ids=str)
@pytest.mark.parametrize("density", ["pruned", "full"])
@every_shape
def test_auto_takes_the_smallest_of_the_formats_that_fit(groups, density, shape):
    weight = make_weight(shape, groups) if density == "pruned" else torch.ones(shape)
    pattern = as_pattern(groups)
    sizes = {}
    for name, cls in FORMATS.items():
        if isinstance(verdict := cls.fits(weight, pattern), Accepted):
            sizes[name] = sum(t.nbytes for t in verdict.format.pack(weight).values())
    chosen = choose_format(weight, pattern, "auto")
    assert sizes[chosen.name] == min(sizes.values())


def test_a_requested_format_is_taken_even_if_it_is_not_the_smallest():
    weight = make_weight((4, 16), (2, 4))
    for name in FORMATS:
        assert choose_format(weight, NM(2, 4), name).name == name


@pytest.mark.parametrize(
    ("weight", "pattern"), [(torch.ones(2, 64), Unstructured(0.5)), (torch.eye(40), NM(2, 40))]
)
def test_a_requested_format_that_can_not_hold_the_weight_is_an_error(weight, pattern):
    with pytest.raises(ConfigError, match=r"format='n:m' can't hold this weight: .*bitmask"):
        choose_format(weight, pattern, "n:m")


def test_n_of_m_finds_the_groups_of_zeros_that_are_already_there():
    verdict = NMPacked.fits(make_weight((6, 64), (2, 8)), Unstructured(0.0))
    assert isinstance(verdict, Accepted)
    assert verdict.format == NMPacked(2, 8)


def test_a_group_with_too_many_values_is_refused_and_not_cut():
    with pytest.raises(FormatError, match="more than 2 non-zero"):
        NMPacked(2, 4).pack(torch.tensor([[1.0, 0, 2, 3]]))


# --- tampering ------------------------------------------------------------------------------


def tensor_cases() -> list[tuple[str, str]]:
    return [(name, key) for name in FORMATS for key in packed_case(name)[1]]


every_tensor = pytest.mark.parametrize(("name", "key"), tensor_cases(), ids=str)


@every_tensor
def test_a_missing_tensor_is_named(name, key):
    fmt, packed, _ = packed_case(name)
    del packed[key]
    assert "missing" in assert_refused(fmt, packed, (4, 13), key)


@every_format
def test_a_tensor_too_many_is_named(name):
    fmt, packed, _ = packed_case(name)
    packed["weight_scales"] = torch.ones(4)
    assert_refused(fmt, packed, (4, 13), "weight_scales")


@every_tensor
@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.bool], ids=str)
def test_a_tensor_of_another_dtype_is_named(name, key, dtype):
    fmt, packed, _ = packed_case(name)
    packed[key] = packed[key].to(dtype)
    assert "dtype" in assert_refused(fmt, packed, (4, 13), key)


@every_tensor
def test_companions_are_no_values_and_values_no_companions(name, key):
    fmt, packed, _ = packed_case(name)
    floats = packed[key].dtype.is_floating_point
    packed[key] = packed[key].to(torch.uint8 if floats else torch.float32)
    assert "dtype" in assert_refused(fmt, packed, (4, 13), key)


RESHAPED = {
    "flat": lambda tensor: tensor.flatten() if tensor.ndim > 1 else tensor.sum(),
    "nested": lambda tensor: tensor.unsqueeze(0),
    "shorter": lambda tensor: tensor[:-1],
    "longer": lambda tensor: torch.cat([tensor, tensor[-1:]]),
}


@every_tensor
@pytest.mark.parametrize("change", RESHAPED)
def test_a_tensor_of_another_shape_is_named(name, key, change):
    fmt, packed, _ = packed_case(name)
    packed[key] = RESHAPED[change](packed[key])
    assert_refused(fmt, packed, (4, 13), key)


@every_format
@pytest.mark.parametrize("shape", [(5, 13), (4, 29), (13, 4)], ids=str)
def test_tensors_of_another_layer_are_refused(name, shape):
    fmt, packed, _ = packed_case(name)
    assert_refused(fmt, packed, shape)


@pytest.mark.parametrize("place", [(0, 0), (3, 12)])
def test_a_bitmask_that_marks_more_or_fewer_weights_than_there_are_is_refused(place):
    fmt, packed, weight = packed_case("bitmask")
    row, column = place
    packed["weight_bitmask"][row, column // 8] ^= 1 << column % 8
    kept = int((weight != 0).sum())
    message = assert_refused(fmt, packed, (4, 13), "weight_bitmask", "weight")
    assert str(kept) in message
    assert str(kept + (-1 if weight[place] != 0 else 1)) in message


@pytest.mark.parametrize("bit", [5, 7])
def test_a_bit_in_a_bitmask_s_padding_is_refused(bit):
    fmt, packed, _ = packed_case("bitmask")  # 13 columns: bits 0..4 of the second byte count
    packed["weight_bitmask"][2, 1] |= 1 << bit
    packed["weight"] = torch.cat([packed["weight"], torch.ones(1)])
    assert_refused(fmt, packed, (4, 13), "weight_bitmask")


@pytest.mark.parametrize("bit", [4, 7])
def test_a_bit_in_the_padding_of_indices_is_refused(bit):
    fmt, packed, _ = packed_case("n:m")  # 4 groups of 3 bits: bits 0..3 of the second byte count
    packed["weight_indices"][1, 1] |= 1 << bit
    assert_refused(fmt, packed, (4, 13), "weight_indices")


@pytest.mark.parametrize("group", [0, 2])
@pytest.mark.parametrize("index", [6, 7])
def test_an_index_that_no_arrangement_has_is_refused(group, index):
    # 2 of 4 positions have 6 arrangements: 0 to 5.
    fmt, packed, _ = packed_case("n:m")
    bits = sum(int(b) << 8 * i for i, b in enumerate(packed["weight_indices"][0]))
    bits = bits & ~(0b111 << 3 * group) | index << 3 * group
    packed["weight_indices"][0] = torch.tensor([bits & 255, bits >> 8], dtype=torch.uint8)
    assert str(index) in assert_refused(fmt, packed, (4, 13), "weight_indices")


@pytest.mark.parametrize(("columns", "arrangements"), [(5, 1), (6, 2), (7, 3)])
def test_an_index_that_reaches_behind_the_tail_is_refused(columns, arrangements):
    # A tail of 1, 2 or 3 inputs keeps 1, 1 or 2: fewer arrangements than a full group has.
    fmt, packed, _ = packed_case("n:m", shape=(2, columns))
    assert packed["weight_indices"].shape == (2, 1)
    packed["weight_indices"][1, 0] = arrangements << 3
    assert_refused(fmt, packed, (2, columns), "weight_indices")
    packed["weight_indices"][1, 0] = arrangements - 1 << 3
    check_packed(fmt, packed, (2, columns))


# --- the layouts, read independently --------------------------------------------------------


def read_bitmask(packed: dict[str, torch.Tensor], shape: tuple[int, int]) -> list[list[float]]:
    """`formats/bitmask.py`: values in row-major order, bit j % 8 of byte j // 8 of each row."""
    values = iter(packed["weight"].tolist())
    rows = []
    for row_bytes in packed["weight_bitmask"].tolist():
        bits = [row_bytes[j // 8] >> (j % 8) & 1 for j in range(shape[1])]
        rows.append([next(values) if bit else 0.0 for bit in bits])
    assert next(values, None) is None
    return rows


def read_n_of_m(
    packed: dict[str, torch.Tensor], shape: tuple[int, int], n: int, m: int
) -> list[list[float]]:
    """`formats/nm.py`: a row's indices are one bit string, each the rank of its positions.

    The combinatorial number system counts position sets in colexicographic order, so the rank is
    the place in the list of all sets ordered by their largest member, then the next, ...
    """
    width_of_index = next(b for b in range(64) if 2**b >= math.comb(m, n))
    rows = []
    for values, row_bytes in zip(
        packed["weight"].tolist(), packed["weight_indices"].tolist(), strict=True
    ):
        bits = [byte >> i & 1 for byte in row_bytes for i in range(8)]
        row: list[float] = []
        taken = 0
        for group, start in enumerate(range(0, shape[1], m)):
            width = min(m, shape[1] - start)
            kept = math.ceil(n * width / m)
            index_bits = bits[group * width_of_index : (group + 1) * width_of_index]
            rank = sum(bit << i for i, bit in enumerate(index_bits))
            sets = sorted(itertools.combinations(range(width), kept), key=lambda c: c[::-1])
            dense = [0.0] * width
            for position, value in zip(sets[rank], values[taken : taken + kept], strict=True):
                dense[position] = value
            taken += kept
            row += dense
        assert taken == len(values)
        rows.append(row)
    return rows


@every_shape
@every_dtype
def test_a_bitmask_file_can_be_read_from_its_description(shape, dtype):
    weight = make_weight(shape, None, dtype)
    packed = accepted("bitmask", weight, None).format.pack(weight)
    assert read_bitmask(packed, shape) == weight.tolist()


@every_shape
@pytest.mark.parametrize("groups", [(2, 4), (1, 4), (4, 8), (3, 5), (1, 2), (5, 6)], ids=str)
def test_an_n_of_m_file_can_be_read_from_its_description(shape, groups):
    weight = make_weight(shape, groups, seed=2)
    # Some groups have more zeros than they must.
    weight[0, : shape[1] // 2] = 0
    packed = NMPacked(*groups).pack(weight)
    assert read_n_of_m(packed, shape, *groups) == weight.tolist()


@SETTINGS
@given(st.integers(0, 2**12 - 1), st.integers(0, 2**12 - 1))
def test_any_valid_file_is_unpacked_as_its_description_says(low, high):
    # From the reader's side: bytes that no packer of ours need have written.
    packed = {
        "weight": torch.arange(1, 9, dtype=torch.float32).view(2, 4) * (1 - low % 2),
        "weight_indices": torch.tensor([[low % 64], [high % 64]], dtype=torch.uint8),
    }
    fmt = NMPacked(2, 4)
    valid = all(code < 6 for byte in (low % 64, high % 64) for code in (byte % 8, byte // 8))
    if valid:
        check_packed(fmt, packed, (2, 8))
        unpacked = fmt.unpack(packed, (2, 8), torch.float32)
        assert unpacked.tolist() == read_n_of_m(packed, (2, 8), 2, 4)
    else:
        assert_refused(fmt, packed, (2, 8), "weight_indices")


def test_the_bytes_of_a_bitmask_are_these():
    weight = torch.tensor([[1.0, 0, 0, 2, 0, 0, 0, 3, 0, 4], [0, 5, 0, 0, 0, 0, 0, 0, 0, 0]])
    packed = FORMATS["bitmask"].from_parameters({}).pack(weight)
    assert packed["weight"].tolist() == [1, 2, 3, 4, 5]
    assert packed["weight_bitmask"].tolist() == [[0b10001001, 0b10], [0b10, 0]]


def test_the_bytes_of_two_of_four_are_these():
    # Positions (0, 1) have rank 0, (2, 3) rank 2 + 3 = 5, (1, 3) rank 1 + 3 = 4; 3 bits each.
    weight = torch.tensor([[1.0, 2, 0, 0, 0, 0, 3, 4, 0, 5, 0, 6]])
    packed = NMPacked(2, 4).pack(weight)
    assert packed["weight"].tolist() == [[1, 2, 3, 4, 5, 6]]
    assert packed["weight_indices"].tolist() == [[0b00_101_000, 0b1]]


def test_a_group_with_too_few_values_stores_zeros_at_the_lowest_free_places():
    packed = NMPacked(2, 4).pack(torch.tensor([[0.0, 0, 7, 0]]))
    assert packed["weight"].tolist() == [[0, 7]]
    assert packed["weight_indices"].tolist() == [[1]]  # (0, 2): C(0, 1) + C(2, 2)
