"""The native library: its file, the threads that it runs in, and its functions over whole weights.

The library lies beside the kernels, whose file most of it is, and is optional. `csrc/abi.h` and
`csrc/whole_weight.cpp` declare what is mirrored here.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .recording import recording

ABI_VERSION = 10
FOLDER = Path(__file__).parents[1] / "kernels" / "cpu"

# As `csrc/tiles.h` numbers them.
FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_I32, _I64, _PTR = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
_SIGNATURES: dict[str, list[Any]] = {
    # rows, n, scores, drop, mask, pool
    "whole_keep_highest": [_I64, _I64, _PTR, _I64, _PTR, _PTR],
    # rows, k, items, item_size, sign, bits, pool
    "whole_nonzero_bits": [_I64, _I64, _PTR, _I64, _I32, _PTR, _PTR],
    # rows, k, items, item_size, bits, count, out, pool
    "whole_kept_items": [_I64, _I64, _PTR, _I64, _PTR, _I64, _PTR, _PTR],
    # count, items, item_size, mask, out, pool
    "whole_zero_outside": [_I64, _PTR, _I64, _PTR, _PTR, _PTR],
    # rows, groups, width, values, scales, zeros, levels, importance, out, pool
    "whole_rounding_errors": [*[_I64] * 3, *[_PTR] * 3, _I32, *[_PTR] * 3],
    # count, items, dtype
    "whole_all_finite": [_I64, _PTR, _I32],
}


@functools.cache
def find() -> ctypes.CDLL | str:
    """The loaded library, or why there is none."""
    found = sorted(p for p in FOLDER.glob("_tiles*") if p.suffix in (".so", ".dylib"))
    if not found:
        return (
            f"no _tiles library in {FOLDER}: the package was installed without a C++ compiler, "
            "or the build failed; installing it again with one (gcc or clang) builds it"
        )
    try:
        library = ctypes.CDLL(str(found[0]))
        version = library.tile_abi_version()
        if version != ABI_VERSION:
            return (
                f"{found[0]} has ABI version {version}, this package needs {ABI_VERSION}: install "
                "the package again, which builds it"
            )
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = _I32, arguments
    except (OSError, AttributeError) as error:
        return f"{found[0]} does not load: {error}"
    return library


def loaded() -> ctypes.CDLL | None:
    """The library, if there is one."""
    found = find()
    return None if isinstance(found, str) else found


def on_cpu(tensor: Tensor) -> bool:
    """May numpy, or the library, read the tensor's memory? Not where operations are recorded."""
    return tensor.device.type == "cpu" and not recording(tensor)


def library_for(*tensors: Tensor) -> ctypes.CDLL | None:
    """The library, if there is one and it may read these."""
    return loaded() if all(map(on_cpu, tensors)) else None


@functools.cache
def thread_pool() -> int | None:
    """The address of libtorch's `torch_parallel_for`, or None before torch 2.10.

    Without it the library stays on the calling thread: a pool of our own would be a second OpenMP
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


def call(function: Any, *arguments: Any) -> None:
    """Call one of the functions over weights with tensors and numbers, in the pool of threads.

    Raises:
        RuntimeError: it refuses its arguments, or there is no memory.
    """
    values = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    code = function(*values, thread_pool())
    if code != 0:
        raise RuntimeError(f"{function.__name__} of {arguments[:2]} failed with code {code}")
