"""Which tokens a mask says are there, whatever its form."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

# Of masks that are added to scores: below it nothing is attended to. Position biases are above it.
NOT_ATTENDED = -5000.0


def token_mask(mask: Tensor | None) -> Bool[Tensor, "samples tokens"] | None:
    """True where there is a token, of a mask as models take them; None if it doesn't tell.

    A mask (samples, tokens) tells it itself, and so does (samples, heads or 1, 1, tokens). In one
    that says for each token what it attends to, (samples, [heads or 1,] tokens, tokens), padding is

    - what does not attend to itself;
    - what attends to itself alone and is attended to by nothing else;
    - what attends to everything though some token behind it does not attend to it: so transformers
      writes the rows of padding on the left, which must not be empty.

    Such a mask is boolean, 1 and 0, or added to the scores, 0 where there is something to attend
    to.
    """
    if mask is None or not 2 <= mask.ndim <= 4:
        return None
    added = mask.is_floating_point() and bool((mask < 0).any())
    if mask.ndim == 2 and not added:
        return mask.bool()
    zeros = mask.ndim > 2 and mask.is_floating_point() and not bool(mask.any())
    attended = mask > NOT_ATTENDED if added or zeros else mask.bool()
    if mask.ndim == 2:
        return attended
    if mask.ndim == 4:
        attended = attended.any(dim=1)
    queries, tokens = attended.shape[1:]
    if queries == 1:
        return attended[:, 0]
    return _of_pairs(attended) if queries == tokens else None


def _of_pairs(attended: Bool[Tensor, "samples tokens tokens"]) -> Bool[Tensor, "samples tokens"]:
    itself = attended.diagonal(dim1=1, dim2=2)
    others = attended & ~torch.eye(attended.shape[1], dtype=torch.bool, device=attended.device)
    alone = ~(others.any(dim=1) | others.any(dim=2))
    unmasked = attended.all(dim=2) & (~attended).tril(-1).any(dim=1)
    return itself & ~alone & ~unmasked


def may_pad(mask: Tensor) -> bool:
    """Does a mask mark any padding, or something that can't be told?"""
    tokens = token_mask(mask)
    return bool((mask != mask.flatten()[:1]).any()) if tokens is None else not bool(tokens.all())
