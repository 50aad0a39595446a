"""SparseGPT as its paper has it, column by column, to compare with."""

import torch
from torch import Tensor

from hf_sparse.core.patterns import NM, Unstructured


def sparsegpt_loop(weight: Tensor, hessian: Tensor, pattern: Unstructured | NM) -> Tensor:
    """The published algorithm column by column (Frantar & Alistarh 2023, algorithm 1)."""
    w, columns = weight.clone(), weight.shape[1]
    damped = hessian.clone()
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, columns, 128):
        end = min(start + 128, columns)
        block, own = w[:, start:end].clone(), upper[start:end, start:end]
        errors, keep = torch.zeros_like(block), torch.ones_like(block, dtype=torch.bool)
        if isinstance(pattern, Unstructured):
            scores = (block / own.diagonal()) ** 2
            keep = scores > scores.flatten().sort().values[int(scores.numel() * pattern.sparsity)]
        for i in range(end - start):
            if isinstance(pattern, NM) and i % pattern.m == 0:
                part = slice(i, i + pattern.m)
                lowest = ((block[:, part] / own.diagonal()[part]) ** 2).topk(
                    pattern.m - pattern.n, dim=1, largest=False
                )
                keep[:, part] = keep[:, part].scatter(1, lowest.indices, False)
            column = block[:, i]
            pruned = column * keep[:, i]
            error = (column - pruned) / own[i, i]
            block[:, i:] -= error.unsqueeze(1) @ own[i, i:].unsqueeze(0)
            block[:, i] = pruned
            errors[:, i] = error
        w[:, start:end] = block
        w[:, end:] -= errors @ upper[start:end, end:]
    return w
