"""The native library: its C ABI, its loading, and the checks before a pointer leaves Python.

`csrc/abi.h` declares what is mirrored here. The library lies beside this module and is optional:
`library()` raises `NativeUnavailableError` with the reason where there is none, and `available()`
says it without raising. The kernels run in torch's own thread pool.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any

import torch
from torch import Tensor

from ...core.native import find
from ...core.native import thread_pool as thread_pool

MAX_DIM = 1 << 27
LAST_PATH = "HF_SPARSE_PATH"  # names the path behind which none is used

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALVES)
INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]  # its name: torch computes nothing in it
INTEGERS = (torch.int8, INT4)  # with scales
PLAIN_PATH = "scalar"  # that every machine has
# As `csrc/tiles.h` numbers them.
NUMBERS = {dtype: number for number, dtype in enumerate((*FLOATS, *INTEGERS))}


class NativeUnavailableError(RuntimeError):
    """There is no native library here; the message says why."""


class NativeError(RuntimeError):
    """The library refused its arguments; the message is its own."""


class Weight(ctypes.Structure):
    """`tiles::Weight`."""

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


class Row(ctypes.Structure):
    """`tiles::Row`."""

    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("pool", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("bias_dtype", ctypes.c_int32),
    ]


class IntegerWeight(ctypes.Structure):
    """`tiles::IntegerWeight`."""

    _fields_ = [
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("masks", ctypes.c_void_p),
        ("tile_base", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("value_bytes", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("kept", ctypes.c_int32),
    ]


class ColumnWeight(ctypes.Structure):
    """`tiles::ColumnWeight`."""

    _fields_ = [
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("dense", ctypes.c_void_p),
        ("packed", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("panel_rows", ctypes.c_int64),
        ("dense_dtype", ctypes.c_int32),
    ]


_I32, _I64, _PTR = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "tile_path_count": (_I32, []),
    "tile_path_name": (ctypes.c_char_p, [_I32]),
    "tile_path_available": (_I32, [_I32]),
    "integer_path_name": (ctypes.c_char_p, [_I32]),
    "tile_message": (ctypes.c_char_p, [_I32]),
    "tile_count_dense": (_I64, [_I64, _I64, _PTR, _I64, _I32]),
    # n, k, bitmask, values, value_count, dtype, masks, tile_base, block_off, packed, bytes, pool
    "tile_pack_bitmask": (
        _I32,
        [_I64, _I64, _PTR, _PTR, _I64, _I32, _PTR, _PTR, _PTR, _PTR, _I64, _PTR],
    ),
    # n, k, dense, stride, dtype, masks, tile_base, block_off, packed, bytes, pool
    "tile_pack_dense": (
        _I32,
        [_I64, _I64, _PTR, _I64, _I32, _PTR, _PTR, _PTR, _PTR, _I64, _PTR],
    ),
    "tile_unpack": (_I32, [_PTR, _PTR, _PTR, _PTR]),
    "tile_check": (_I32, [_PTR]),
    # weight, path, x, dtype, m, stride, bias, dtype, y, dtype, stride, pool
    "tile_linear": (
        _I32,
        [_PTR, _I32, _PTR, _I32, _I64, _I64, _PTR, _I32, _PTR, _I32, _I64, _PTR],
    ),
    # row, x, y
    "tile_row": (_I32, [_PTR, _PTR, _PTR]),
    # n, k, codes, bits, kept, tile_base, pool
    "integer_measure": (_I32, [_I64, _I64, _PTR, _I32, _I32, _PTR, _PTR]),
    # n, k, codes, bits, kept, tile_base, masks, values, bytes, pool
    "integer_pack": (_I32, [_I64, _I64, _PTR, _I32, _I32, _PTR, _PTR, _PTR, _I64, _PTR]),
    "integer_unpack": (_I32, [_PTR, _PTR, _PTR]),
    "integer_check": (_I32, [_PTR]),
    # as tile_linear and tile_row
    "integer_linear": (
        _I32,
        [_PTR, _I32, _PTR, _I32, _I64, _I64, _PTR, _I32, _PTR, _I32, _I64, _PTR],
    ),
    "integer_row": (_I32, [_PTR, _PTR, _PTR]),
    # weight, offsets
    "columns_index": (_I32, [_PTR, _PTR]),
    "columns_check": (_I32, [_PTR]),
    # as tile_linear and tile_row
    "columns_linear": (
        _I32,
        [_PTR, _I32, _PTR, _I32, _I64, _I64, _PTR, _I32, _PTR, _I32, _I64, _PTR],
    ),
    "columns_row": (_I32, [_PTR, _PTR, _PTR]),
    # n, k, w, dtype, stride, path, x, dtype, y, dtype, pool
    "tile_dense_row": (
        _I32,
        [_I64, _I64, _PTR, _I32, _I64, _I32, _PTR, _I32, _PTR, _I32, _PTR],
    ),
    # weight, path, tile_begin, tile_end, out, dtype, stride, transposed, pool
    "tile_decode": (
        _I32,
        [_PTR, _I32, _I64, _I64, _PTR, _I32, _I64, _I32, _PTR],
    ),
}


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    found = find()
    if isinstance(found, str):
        return found
    try:
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError as error:
        return f"the native library lacks a function: {error}"
    named = {found.tile_path_name(i).decode() for i in range(found.tile_path_count())}
    if (last := os.environ.get(LAST_PATH)) is not None and last not in named:
        return f"{LAST_PATH}={last} names no path: there are {', '.join(sorted(named))}"
    return found


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
def paths() -> dict[str, int]:
    """The paths that this CPU can run, by name, the preferred one last."""
    lib = library()
    return {
        lib.tile_path_name(i).decode(): i
        for i in range(lib.tile_path_count())
        if lib.tile_path_available(i)
    }


@functools.cache
def integer_path() -> str:
    """The path whose integer products are the best here."""
    name: bytes = library().integer_path_name(-1)
    return name.decode()


def describe() -> str:
    """For reports: the paths, or why there is nothing."""
    reason = unavailable_reason()
    if reason is not None:
        return f"native kernels unavailable: {reason}"
    return f"native kernels: {', '.join(paths())}"


def describe_threads() -> str:
    """For reports: how many threads a product takes."""
    if unavailable_reason() is None and not thread_pool():
        return "one thread (this torch does not export torch_parallel_for; 2.10 does)"
    number = torch.get_num_threads()
    return f"{number} thread{'s' * (number > 1)} of torch's pool"


def path_number(name: str | None) -> int:
    """The library's number of a path; None is the best one for the call."""
    if name is None:
        return -1
    try:
        return paths()[name]
    except KeyError:
        raise ValueError(f"no path {name!r} on this CPU; there are {', '.join(paths())}") from None


def raise_on(code: int, doing: str) -> None:
    """Raise `NativeError` unless the code says that all went well."""
    if code != 0:
        raise NativeError(f"{doing}: {library().tile_message(code).decode()}")


def checked(tensor: Tensor, name: str, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """The tensor as it can be read: strided, on the CPU, of one of the dtypes, signs in place.

    Raises:
        TypeError, ValueError: names the tensor and what it isn't.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, not on {tensor.device}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be strided, not {tensor.layout}")
    if tensor.dtype not in dtypes:
        expected = ", ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} is {tensor.dtype}, expected {expected}")
    return tensor.resolve_neg()  # views may leave the sign to whoever reads them


def check_shape(tensor: Tensor, name: str, shape: tuple[int, ...]) -> None:
    """Is it contiguous and of that shape?"""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous")


def check_dims(n: int, k: int) -> None:
    """Are these the sides of a weight that the kernels take?"""
    if not (1 <= n <= MAX_DIM and 1 <= k <= MAX_DIM):
        raise ValueError(f"a weight of {n} x {k}: both must be between 1 and {MAX_DIM}")
