"""The native core: sparse weights in the T16 layout, multiplied on the CPU.

`csrc/t16.h` describes the layout and why it is so. This module finds the shared library beside
itself, checks every argument before a pointer leaves Python, and gives the kernels torch's own
thread pool.

    weight = pack(bitmask, values, (out_features, in_features))
    y = linear(x, weight, bias)

The library is optional: `library()` raises `NativeUnavailableError` with the reason where there is
none, and `available()` says it without raising.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ABI_VERSION = 3
ROWS = 16  # outputs of a tile
BLOCK_COLUMNS = 256  # columns between two entries of block_off
VALUE_PADDING = 64  # bytes that the decoders may read beyond the last value
MAX_DIM = 1 << 27

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALVES)
INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]  # its name: torch computes nothing in it
INTEGERS = (torch.int8, INT4)  # with scales
_DTYPES = {dtype: number for number, dtype in enumerate((*FLOATS, *INTEGERS))}
_PACKED = (*FLOATS, torch.int8)  # what can be packed; int4 is `narrow`'s


class NativeUnavailableError(RuntimeError):
    """There is no native library here; the message says why."""


class NativeError(RuntimeError):
    """The library refused its arguments; the message is its own."""


class _Weight(ctypes.Structure):
    """`t16::Weight`."""

    _fields_ = [
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("masks", ctypes.c_void_p),
        ("tile_base", ctypes.c_void_p),
        ("block_off", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("value_bytes", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("value_dtype", ctypes.c_int32),
        ("normal", ctypes.c_int32),
    ]


_I32, _I64, _PTR = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "t16_abi_version": (_I32, []),
    "t16_path_count": (_I32, []),
    "t16_path_name": (ctypes.c_char_p, [_I32]),
    "t16_path_available": (_I32, [_I32]),
    "t16_message": (ctypes.c_char_p, [_I32]),
    "t16_count_dense": (_I64, [_I64, _I64, _PTR, _I64, _I32]),
    # n, k, bitmask, values, value_count, dtype, masks, tile_base, block_off, packed, bytes, pool
    "t16_pack_bitmask": (
        _I32,
        [_I64, _I64, _PTR, _PTR, _I64, _I32, _PTR, _PTR, _PTR, _PTR, _I64, _PTR],
    ),
    # n, k, dense, stride, dtype, masks, tile_base, block_off, packed, bytes, pool
    "t16_pack_dense": (
        _I32,
        [_I64, _I64, _PTR, _I64, _I32, _PTR, _PTR, _PTR, _PTR, _I64, _PTR],
    ),
    "t16_unpack": (_I32, [_PTR, _PTR, _PTR, _PTR]),
    "t16_check": (_I32, [_PTR]),
    # weight, path, x, dtype, m, stride, bias, dtype, y, dtype, stride, pool
    "t16_linear": (
        _I32,
        [_PTR, _I32, _PTR, _I32, _I64, _I64, _PTR, _I32, _PTR, _I32, _I64, _PTR],
    ),
    # n, k, w, dtype, stride, path, x, dtype, y, dtype, pool
    "t16_gemv": (
        _I32,
        [_I64, _I64, _PTR, _I32, _I64, _I32, _PTR, _I32, _PTR, _I32, _PTR],
    ),
    # weight, path, tile_begin, tile_end, out, dtype, stride, transposed, pool
    "t16_decode_panel": (
        _I32,
        [_PTR, _I32, _I64, _I64, _PTR, _I32, _I64, _I32, _PTR],
    ),
}


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    folder = Path(__file__).parent
    found = sorted(path for path in folder.glob("_t16*") if path.suffix in (".so", ".dylib"))
    if not found:
        return (
            f"no _t16 library in {folder}: the package was installed without a C++ compiler, "
            "or the build failed; installing it again with one (gcc or clang) builds it"
        )
    try:
        library = ctypes.CDLL(str(found[0]))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return f"{found[0]} does not load: {error}"
    version = library.t16_abi_version()
    if version != ABI_VERSION:
        return f"{found[0]} has ABI version {version}, this package needs {ABI_VERSION}"
    return library


def library() -> ctypes.CDLL:
    """The loaded library. Raises `NativeUnavailableError` with the reason if there is none."""
    loaded = _load()
    if isinstance(loaded, str):
        raise NativeUnavailableError(loaded)
    return loaded


def available() -> bool:
    return not isinstance(_load(), str)


def unavailable_reason() -> str | None:
    """Why there is no library, or None if there is one."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


@functools.cache
def thread_pool() -> int | None:
    """The address of libtorch's `torch_parallel_for`, or None before torch 2.10.

    Without it the kernels stay on the calling thread: a pool of our own would be a second OpenMP
    that fights with torch's for the cores.
    """
    names = ("libtorch_cpu.so", "libtorch_cpu.dylib")
    folder = Path(torch.__file__).parent / "lib"
    # None is the process itself: a torch that is linked into the program.
    for name in [*(str(folder / name) for name in names if (folder / name).exists()), None]:
        try:
            function = ctypes.CDLL(name).torch_parallel_for
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value
    return None


@functools.cache
def paths() -> dict[str, int]:
    """The paths that this CPU can run, by name, the preferred one last."""
    lib = library()
    return {
        lib.t16_path_name(i).decode(): i
        for i in range(lib.t16_path_count())
        if lib.t16_path_available(i)
    }


def describe() -> str:
    """One line for reports: the paths, the threads, or why there is nothing."""
    reason = unavailable_reason()
    if reason is not None:
        return f"native kernels unavailable: {reason}"
    threads = (
        f"{torch.get_num_threads()} threads of torch's pool"
        if thread_pool()
        else "one thread (this torch does not export torch_parallel_for; 2.10 does)"
    )
    return f"native kernels: {', '.join(paths())}; {threads}"


def _path_number(name: str | None) -> int:
    if name is None:
        return -1
    try:
        return paths()[name]
    except KeyError:
        raise ValueError(f"no path {name!r} on this CPU; there are {', '.join(paths())}") from None


def _raise_on(code: int, doing: str) -> None:
    if code != 0:
        raise NativeError(f"{doing}: {library().t16_message(code).decode()}")


def _check(tensor: Tensor, name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, not on {tensor.device}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be strided, not {tensor.layout}")
    if tensor.dtype not in dtypes:
        expected = ", ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} is {tensor.dtype}, expected {expected}")


def _check_shape(tensor: Tensor, name: str, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous")


def _check_dims(n: int, k: int) -> None:
    if not (1 <= n <= MAX_DIM and 1 <= k <= MAX_DIM):
        raise ValueError(f"a weight of {n} x {k}: both must be between 1 and {MAX_DIM}")


@dataclass(frozen=True, eq=False)
class T16Weight:
    """A packed weight, checked when it is made: from then on the kernels trust its masks.

    masks: int32[tiles, pairs], bit 2 r + c for row r and column c of a pair
    tile_base: int64[tiles + 1]; block_off: int32[tiles, ceil(K / 256)]
    values: uint8[count * item size + 64], the kept values of `dtype`; of int4, two to a byte
    scales: fp32[tiles, groups, 16] for int8 and int4, else None; `group_size` columns share one

    The tensors must not be written to afterwards.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    masks: Tensor
    tile_base: Tensor
    block_off: Tensor
    values: Tensor
    scales: Tensor | None = None
    group_size: int = 0
    _struct: _Weight = field(init=False, repr=False)
    _address: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        n, k = self.shape
        _check_dims(n, k)
        tiles, pairs = -(-n // ROWS), -(-k // 2)
        if self.dtype not in _DTYPES:
            raise TypeError(f"values are {self.dtype}, expected one of {list(_DTYPES)}")
        for name, dtype, shape in (
            ("masks", torch.int32, (tiles, pairs)),
            ("tile_base", torch.int64, (tiles + 1,)),
            ("block_off", torch.int32, (tiles, -(-k // BLOCK_COLUMNS))),
            ("values", torch.uint8, (self.values.numel(),)),
        ):
            tensor = getattr(self, name)
            _check(tensor, name, (dtype,))
            _check_shape(tensor, name, shape)
        if (self.scales is None) != (self.dtype not in INTEGERS):
            raise ValueError(f"{self.dtype} values and scales {self.scales is not None}")
        if self.scales is not None:
            if self.group_size < 1 or (self.group_size < k and self.group_size % 2):
                raise ValueError(
                    f"group_size {self.group_size} must be positive, and even below K = {k}"
                )
            _check(self.scales, "scales", (torch.float32,))
            _check_shape(self.scales, "scales", (tiles, -(-k // self.group_size), ROWS))
        struct = _Weight(
            n,
            k,
            self.masks.data_ptr(),
            self.tile_base.data_ptr(),
            self.block_off.data_ptr(),
            self.values.data_ptr(),
            self.scales.data_ptr() if self.scales is not None else None,
            self.values.numel(),
            self.group_size,
            _DTYPES[self.dtype],
        )
        object.__setattr__(self, "_struct", struct)
        object.__setattr__(self, "_address", ctypes.addressof(struct))
        _raise_on(library().t16_check(self._address), f"T16 weight of {n} x {k}")

    @property
    def count(self) -> int:
        """Kept values."""
        return int(self.tile_base[-1])

    @property
    def nbytes(self) -> int:
        """Resident bytes."""
        tensors = (self.masks, self.tile_base, self.block_off, self.values, self.scales)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def __reduce__(self) -> tuple[Any, ...]:
        # The struct holds addresses: a copy is made, and checked, anew.
        return T16Weight, (
            self.shape,
            self.dtype,
            self.masks,
            self.tile_base,
            self.block_off,
            self.values,
            self.scales,
            self.group_size,
        )


def tile_scales(scales: Tensor, n: int) -> Tensor:
    """Scales [N] or [N, groups] in the order of the kernels, fp32[tiles, groups, 16]."""
    _check(scales, "scales", FLOATS)
    if scales.dim() not in (1, 2) or scales.shape[0] != n:
        raise ValueError(f"scales have shape {tuple(scales.shape)}, expected ({n},) or ({n}, G)")
    columns = scales.float().reshape(n, -1)
    tiles = -(-n // ROWS)
    padded = columns.new_zeros(tiles * ROWS, columns.shape[1])
    padded[:n] = columns
    return padded.reshape(tiles, ROWS, -1).transpose(1, 2).contiguous()


def _pack(
    n: int,
    k: int,
    dtype: torch.dtype,
    count: int,
    scales: Tensor | None,
    group_size: int | None,
    call: Callable[..., int],
) -> T16Weight:
    tiles, pairs = -(-n // ROWS), -(-k // 2)
    masks = torch.empty(tiles, pairs, dtype=torch.int32)
    tile_base = torch.empty(tiles + 1, dtype=torch.int64)
    block_off = torch.empty(tiles, -(-k // BLOCK_COLUMNS), dtype=torch.int32)
    packed = torch.empty(count * dtype.itemsize + VALUE_PADDING, dtype=torch.uint8)
    code = call(
        masks.data_ptr(),
        tile_base.data_ptr(),
        block_off.data_ptr(),
        packed.data_ptr(),
        packed.numel(),
        thread_pool(),
    )
    _raise_on(code, f"packing a weight of {n} x {k}")
    tiled = tile_scales(scales, n) if scales is not None else None
    groups = tiled.shape[1] if tiled is not None else 1
    if group_size is None:
        if groups != 1:
            raise ValueError(f"scales of {groups} groups need a group_size")
        group_size = k
    return T16Weight((n, k), dtype, masks, tile_base, block_off, packed, tiled, group_size)


def pack(
    bitmask: Tensor,
    values: Tensor,
    shape: tuple[int, int],
    scales: Tensor | None = None,
    group_size: int | None = None,
) -> T16Weight:
    """Packs the file's layout: uint8[N, ceil(K/8)], lowest bit first, and row-major kept values.

    int8 values need `scales`, [N] or [N, ceil(K / group_size)]. Raises `NativeError` if the mask's
    bits and the values' number differ or a bit beyond K is set.
    """
    n, k = shape
    _check_dims(n, k)
    _check(bitmask, "bitmask", (torch.uint8,))
    _check_shape(bitmask, "bitmask", (n, -(-k // 8)))
    _check(values, "values", _PACKED)
    _check_shape(values, "values", (values.numel(),))
    count = values.numel()
    return _pack(
        n,
        k,
        values.dtype,
        count,
        scales,
        group_size,
        lambda *to: library().t16_pack_bitmask(
            n, k, bitmask.data_ptr(), values.data_ptr(), count, _DTYPES[values.dtype], *to
        ),
    )


def pack_dense(
    dense: Tensor, scales: Tensor | None = None, group_size: int | None = None
) -> T16Weight:
    """Packs what isn't zero of dense[N, K]."""
    _check(dense, "dense", _PACKED)
    if dense.dim() != 2:
        raise ValueError(f"dense has {dense.dim()} dimensions, expected 2")
    n, k = dense.shape
    _check_dims(n, k)
    rows = dense.detach()
    if rows.stride(1) != 1 or rows.stride(0) < k:
        rows = rows.contiguous()
    dtype, stride = _DTYPES[rows.dtype], max(rows.stride(0), k)
    count = library().t16_count_dense(n, k, rows.data_ptr(), stride, dtype)
    return _pack(
        n,
        k,
        rows.dtype,
        count,
        scales,
        group_size,
        lambda *to: library().t16_pack_dense(n, k, rows.data_ptr(), stride, dtype, *to),
    )


def narrow(weight: T16Weight) -> T16Weight:
    """An int8 weight with values in -8..7 as int4: value i is nibble i % 2 of byte i // 2.

    Raises:
        ValueError: a value is out of range, or the weight isn't int8.
    """
    if weight.dtype != torch.int8:
        raise ValueError(f"only int8 values can be narrowed, not {weight.dtype}")
    values = weight.values[: weight.count].view(torch.int8)
    if weight.count and not bool(((values >= -8) & (values <= 7)).all()):
        raise ValueError("int4 values are -8 to 7, these aren't")
    size = -(-weight.count // 2)
    nibbles = torch.zeros(2 * size, dtype=torch.uint8)
    nibbles[: weight.count] = weight.values[: weight.count] & 15
    packed = torch.zeros(size + VALUE_PADDING, dtype=torch.uint8)
    packed[:size] = nibbles[::2] | nibbles[1::2] << 4
    return _with_values(weight, INT4, packed)


def _widen(weight: T16Weight) -> T16Weight:
    """`narrow` undone."""
    bytes_ = weight.values[: -(-weight.count // 2)].view(torch.int8)
    nibbles = torch.stack([bytes_ << 4 >> 4, bytes_ >> 4], dim=1).flatten()
    values = torch.zeros(weight.count + VALUE_PADDING, dtype=torch.int8)
    values[: weight.count] = nibbles[: weight.count]
    return _with_values(weight, torch.int8, values.view(torch.uint8))


def _with_values(weight: T16Weight, dtype: torch.dtype, values: Tensor) -> T16Weight:
    return T16Weight(
        weight.shape,
        dtype,
        weight.masks,
        weight.tile_base,
        weight.block_off,
        values,
        weight.scales,
        weight.group_size,
    )


def unpack(weight: T16Weight) -> tuple[Tensor, Tensor]:
    """The bitmask and the values that `pack` was given; of an int4 weight those in int8."""
    if weight.dtype == INT4:
        weight = _widen(weight)
    n, k = weight.shape
    bitmask = torch.empty(n, -(-k // 8), dtype=torch.uint8)
    values = torch.empty(weight.count, dtype=weight.dtype)
    code = library().t16_unpack(
        weight._address, bitmask.data_ptr(), values.data_ptr(), thread_pool()
    )
    _raise_on(code, "unpacking")
    return bitmask, values


def decode(
    weight: T16Weight,
    dtype: torch.dtype | None = None,
    tiles: tuple[int, int] | None = None,
    path: str | None = None,
    transposed: bool = False,
    memory: Tensor | None = None,
) -> Tensor:
    """The dense rows of tiles [begin, end), all of them by default, in fp32, bf16 or fp16.

    Scales are applied. The dtype is the values' own, or fp32 for int8 and int4. The result is
    (rows, K), or (K, rows) if `transposed`, which takes less time; it lies at the beginning of
    `memory`, a contiguous tensor of the dtype with at least as many elements, if that is given.
    """
    n, k = weight.shape
    begin, end = tiles if tiles is not None else (0, -(-n // ROWS))
    if not 0 <= begin <= end <= -(-n // ROWS):
        raise ValueError(f"tiles {begin} to {end} of a weight that has {-(-n // ROWS)}")
    if dtype is None:
        dtype = torch.float32 if weight.dtype in INTEGERS else weight.dtype
    if dtype not in FLOATS:
        raise TypeError(f"a panel can be {FLOATS}, not {dtype}")
    rows = max(min(n, end * ROWS) - begin * ROWS, 0)
    if memory is None:
        memory = torch.empty(rows * k, dtype=dtype)
    _check(memory, "memory", (dtype,))
    if memory.numel() < rows * k or not memory.is_contiguous():
        raise ValueError(f"memory of {memory.numel()} elements, {rows * k} are needed in a piece")
    code = library().t16_decode_panel(
        weight._address, _path_number(path), begin, end, memory.data_ptr(), _DTYPES[dtype],
        rows if transposed else k, transposed, thread_pool(),
    )  # fmt: skip
    _raise_on(code, "decoding")
    return memory.view(-1)[: rows * k].view((k, rows) if transposed else (rows, k))


def linear(
    x: Tensor, weight: T16Weight, bias: Tensor | None = None, path: str | None = None
) -> Tensor:
    """F.linear: x[..., K] W^T + bias[N], summed in fp32, in x's dtype.

    x may be fp32, bf16 or fp16 whatever the values are; rows of x may lie apart. `path` names the
    instruction set, by default the best one. The result doesn't depend on the number of threads.
    """
    n, k = weight.shape
    _check(x, "x", FLOATS)
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., {k})")
    if bias is not None:
        _check(bias, "bias", FLOATS)
        _check_shape(bias, "bias", (n,))
    m = math.prod(x.shape[:-1])
    rows = x if x.dim() == 2 else x.reshape(m, k)
    stride = rows.stride(0)
    # A single row has no stride to speak of, and torch reports any number for it.
    if (k > 1 and rows.stride(1) != 1) or (m > 1 and stride < k):
        rows = rows.contiguous()
        stride = k
    y = torch.empty(*x.shape[:-1], n, dtype=x.dtype)
    dtype = _DTYPES[x.dtype]
    code = library().t16_linear(
        weight._address,
        _path_number(path),
        rows.data_ptr(),
        dtype,
        m,
        max(stride, k),
        bias.data_ptr() if bias is not None else None,
        _DTYPES[bias.dtype] if bias is not None else 0,
        y.data_ptr(),
        dtype,
        n,
        thread_pool(),
    )
    _raise_on(code, f"linear of x {tuple(x.shape)} and a weight of {n} x {k}")
    return y


def gemv(x: Tensor, weight: Tensor, path: str | None = None) -> Tensor:
    """F.linear of one row: x[..., K] with one row times a dense weight[N, K] of bf16 or fp16.

    Summed in fp32, in x's dtype, fp32, bf16 or fp16. The result doesn't depend on the number of
    threads.
    """
    _check(x, "x", FLOATS)
    _check(weight, "weight", HALVES)
    if weight.dim() != 2 or weight.stride(1) != 1 or weight.stride(0) < weight.shape[1]:
        raise ValueError(f"weight {tuple(weight.shape)} must have contiguous rows")
    n, k = weight.shape
    _check_dims(n, k)
    if x.numel() != k or x.shape[-1:] != (k,):
        raise ValueError(f"x has shape {tuple(x.shape)}, expected one row of {k}")
    row = x.contiguous()
    y = torch.empty(*x.shape[:-1], n, dtype=x.dtype)
    code = library().t16_gemv(
        n, k, weight.data_ptr(), _DTYPES[weight.dtype], weight.stride(0), _path_number(path),
        row.data_ptr(), _DTYPES[x.dtype], y.data_ptr(), _DTYPES[y.dtype], thread_pool(),
    )  # fmt: skip
    _raise_on(code, f"product of x {tuple(x.shape)} and a dense weight of {n} x {k}")
    return y
