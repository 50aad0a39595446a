"""Compiles the GPU kernels for two compute capabilities, no GPU needed, and prints what came out.

Run by test_compiled.py in a process of its own, since that one may have Triton interpret kernels.
The code that launches kernels runs as it is, on CPU tensors; Triton asks a made-up driver what to
compile for, and hands it the launch.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver
from triton.runtime import driver

from hf_sparse.core.attention_settings import AttentionSettings
from hf_sparse.core.patterns import NM
from hf_sparse.kernels.gpu import pack
from hf_sparse.kernels.gpu import weight as gpu_weight
from hf_sparse.kernels.gpu.triton_decode import decode_window, windows
from hf_sparse.kernels.gpu.triton_product import product
from hf_sparse.layers.attention import triton_blocks
from hf_sparse.layers.attention.inputs import Inputs
from hf_sparse.layers.attention.masks import LazyMask
from hf_sparse.layers.attention.selectors import SELECTORS
from hf_sparse.solvers import sparsegpt

MOST_THREADS = 1024
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


class MadeUp(GPUDriver):
    """A GPU for each compute capability, with that for its number; `launches` says what was run."""

    def __init__(self) -> None:
        self.capability = 90
        self.launches: list[dict] = []
        self.utils = self

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return {"max_shared_mem": 227 << 10}

    def load_binary(self, name, cubin, shared, device):
        """As the driver's: module, function, registers and spilled bytes of a thread, threads."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "kernel.cubin")
            path.write_bytes(cubin)
            command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, *spilled = map(int, USAGE.search(text).groups())
        usage = {"registers": registers, "spilled": sum(spilled)}
        return None, usage, registers, sum(spilled), MOST_THREADS

    def launcher_cls(self, src, metadata):
        constants = {src.fn.arg_names[at]: value for (at,), value in src.constants.items()}

        def launch(*arguments):
            *grid, _, usage = arguments[:5]
            self.launches.append(
                {
                    "capability": self.capability,
                    "kernel": metadata.name,
                    "grid": grid,
                    "warps": metadata.num_warps,
                    "shared": metadata.shared,
                    "signature": src.signature,
                    "constants": constants,
                    **usage,
                }
            )

        return launch

    def get_active_torch_device(self):
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty):
        raise NotImplementedError

    def get_benchmarker(self):
        raise NotImplementedError

    @staticmethod
    def is_active():
        return True


def weight_of(dtype, width, rows=64, columns=208, group=None):
    """A weight with gaps of `width` bits; codes have a scale for every `group` columns of a row."""
    dense = torch.randn(rows, columns) * (torch.rand(rows, columns) < 0.5)
    scales = None
    if group is not None:
        limit = 7 if dtype == gpu_weight.INT4 else 100
        dense = (dense * limit / 2).round().clamp(-limit, limit).to(torch.int8)
        scales = torch.rand(rows, -(-columns // group))
    else:
        dense = dense.to(dtype)
    with mock.patch.object(pack, "_best_width", return_value=width):
        weight = pack.pack_dense(dense, scales, group)
    assert (weight.dtype, weight.width) == (dtype, width)
    return weight


def multiply(tokens, x_dtype, *args, **kwargs):
    weight = weight_of(*args, **kwargs)
    product(torch.randn(tokens, weight.shape[1]).to(x_dtype), weight)


def decode(x_dtype, *args, **kwargs):
    weight = weight_of(*args, **kwargs)
    for first, last in windows(weight):
        decode_window(
            weight, first, last, torch.empty(weight.shape[0], weight.shape[1], dtype=x_dtype)
        )


def solve(width, pattern, rows=64):
    """A block of columns; rows that no power of two divides take more registers."""
    block = torch.randn(width, rows), torch.ones(width, rows, dtype=torch.bool)
    upper = torch.randn(2 * width, 2 * width)[:width, :width]
    sparsegpt._solve_at_once(*block, upper, torch.zeros(width, dtype=torch.bool), pattern)


def attend(dtype, channels, groups=3, **settings):
    """Attention over chosen blocks of 400 keys, with the sizes of the settings."""
    query, key = torch.randn(1, 2 * groups, 400, channels), torch.randn(1, 2, 400, channels)
    mask = LazyMask.plain(query, key, True)
    inputs = Inputs.of(query, key, key, mask, 0.1, AttentionSettings(keys=128, **settings))
    blocks = SELECTORS["block"]().select(inputs, AttentionSettings(keys=128, **settings), {}).blocks
    names = ("queries", "keys", "values")
    inputs = replace(inputs, **{name: getattr(inputs, name).to(dtype) for name in names})
    triton_blocks.block_part(inputs, blocks)


F32, BF16, F16 = gpu_weight.FLOATS
I8, I4 = torch.int8, gpu_weight.INT4

# What takes most registers; then each width of gaps, type of values and of x, kind of scale and
# number of tokens at least once.
LARGE = [
    (multiply, (8, BF16, BF16, 3), {"rows": 8224}),
    (decode, (BF16, I4, 3), {"group": 16}),
    (solve, (sparsegpt.LARGEST_KERNEL_BLOCK, NM(2, 4), 45), {}),
    (attend, (BF16, 128), {}),
]
OTHERS = [
    (multiply, (1, BF16, BF16, 3), {}),
    (multiply, (4, F32, F32, 2), {"columns": 203}),
    (multiply, (8, BF16, I8, 4), {"group": 16}),
    (multiply, (16, F16, I4, 3), {"group": 208}),
    (decode, (F32, F32, 4), {"columns": 203}),
    (decode, (F16, I8, 2), {"group": 208}),
    (solve, (128, None, 45), {}),
    (solve, (128, NM(4, 8)), {}),
    (attend, (F16, 64), {"block": 64, "key_block": 32}),
    (attend, (F32, 80), {"groups": 1, "key_block": 12}),
]


if __name__ == "__main__":
    made_up = MadeUp()
    driver.set_active(made_up)
    for capability, cases in ((80, LARGE), (90, LARGE + OTHERS)):
        made_up.capability = capability
        for run, args, kwargs in cases:
            run(*args, **kwargs)
    sys.stdout.write(json.dumps(made_up.launches, default=str))
