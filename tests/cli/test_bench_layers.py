"""`bench layers` with rounded activations: what is measured, on a tiny shape."""

import pytest

from hf_sparse.core.errors import ConfigError
from hf_sparse.kernels.cpu import library
from hf_sparse_cli.bench.layers import EXACT
from hf_sparse_cli.commands.bench import bench_layers

if not library.available():
    pytest.skip("no native library", allow_module_level=True)

TINY = {"shapes": "256x512", "rows": "1,3", "values": "int8,int4", "group_size": 64, "cold_mb": 1}
TINY |= {"rounds": 1, "seconds": 0.0, "activations": "int8", "threads": "1"}


@pytest.mark.parametrize(
    ("arguments", "kinds", "share"),
    [
        ({"sparsity": "0.5"}, ["int8", "int4"], [0.34, 0.23]),
        ({"sparsity": "0"}, ["int8", "int4"], [0.53, 0.28]),
        ({"pattern": "4:8"}, ["int8 4:8", "int4 4:8"], [0.34, 0.22]),
    ],
)
def test_rounded_products_are_measured_beside_exact_ones(arguments, kinds, share, tmp_path):
    points = bench_layers(**TINY, **arguments, output=tmp_path / "out").figures["layers"]
    assert [point["values"] for point in points] == [kind for kind in kinds for _ in range(2)]
    for point in points:
        expected = share[kinds.index(point["values"])]
        assert point["sparse_bytes"] / point["dense_bytes"] == pytest.approx(expected, abs=0.04)
        assert 1e-4 < point["difference"] < 3e-2  # x is rounded, and no more than that
        assert EXACT in point["ratios"]


def test_a_pattern_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="pattern='4to8' is not known"):
        bench_layers(**TINY, pattern="4to8", output=tmp_path / "out")
