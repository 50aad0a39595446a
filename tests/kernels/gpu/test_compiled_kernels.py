"""The Triton kernels compiled for compute capabilities 8.0 and 9.0: is there room for them?"""

import json
import os
import subprocess
import sys

import pytest

from conftest import ROOT
from hf_sparse.kernels.gpu import weight

pytest.importorskip("triton", reason="triton compiles the kernels")
pytestmark = pytest.mark.slow  # two compilations of every kernel

PROGRAM = ROOT / "tests" / "helpers" / "compiled.py"
REGISTERS = 65536  # of a multiprocessor
FEW_BYTES = 32  # of a thread, which ptxas puts aside at times to have one more program at work
SHARED = 48 << 10  # bytes a program gets on every GPU
MORE_SHARED = 99 << 10  # and what it gets where Triton asks for more, from capability 8.0 on
PRODUCT_WARPS = 16  # on a multiprocessor: what the layout counts on when it splits rows


@pytest.fixture
def launches(tmp_path):
    """What was compiled and launched."""
    own_cache = {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(PROGRAM)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **own_cache})
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert {(each["capability"], each["kernel"]) for each in found} == {
        (capability, kernel)
        for capability in (80, 90)
        for kernel in ("_product", "_decode_window", "_solve_block", "_attend")
    }
    return found


def test_kernels_compile_stay_in_registers_and_find_room_on_a_multiprocessor(launches):
    for each in launches:
        assert each["spilled"] <= FEW_BYTES, each
        assert each["shared"] <= (MORE_SHARED if each["kernel"] == "_attend" else SHARED), each
        assert each["registers"] * each["warps"] * 32 <= REGISTERS, each
    # As many warps of products fit as the layout counts on.
    products = [each for each in launches if each["kernel"] == "_product"]
    assert {each["warps"] for each in products} == set(weight.WARPS)
    for each in products:
        if each["signature"]["values"] != "*fp32":
            assert each["registers"] * PRODUCT_WARPS * 32 <= REGISTERS, each
