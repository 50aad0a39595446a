"""The damped Hessian, to the bit; the factor itself is tested with the statistics."""

import numpy as np
import torch

from hf_sparse.core.inverse_factor import damped


def test_the_mean_that_damps_is_summed_along_the_diagonal_in_place():
    # In fp32 the ones beside 2^24 count or vanish, by the order of the sum: four running sums.
    diagonal = np.ones(48, dtype=np.float32)
    diagonal[0] = 2**24
    sums = np.zeros(4, dtype=np.float32)
    for four in diagonal.reshape(-1, 4):
        sums += four
    mean = np.float32(np.float32(np.float32(sums[0] + sums[1]) + sums[2]) + sums[3]) / np.float32(
        48
    )
    hessian = torch.diag(torch.from_numpy(diagonal))
    found = damped(hessian, 2**-10, torch.float32).diagonal()
    assert found.tolist() == (diagonal + np.float32(mean * 2**-10)).tolist()
    assert float(mean) != float(hessian.diagonal().contiguous().mean())  # The test can fail.
