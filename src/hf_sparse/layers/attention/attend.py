"""Attention over the pairs that a selector picks, and what a residual has for the others.

With S the selected pairs of a query q, and p(q, k) the residual's estimate of exp(q k),

    out = (sum over S of exp(q k) v + sum over the rest of p(q, k) v) / (the same without v).

Whole blocks of keys are left out of the residual's sums; of single pairs the estimate is taken off
again (Chen et al. 2021, "Scatterbrain", equation 3).
"""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor

from ...kernels.gpu.triton_works import obstacle
from .base import Clusters, Residual, Selection
from .inputs import Inputs, Part


def attend(
    inputs: Inputs, selection: Selection, residual: Residual, dropout: float = 0.0
) -> Tensor:
    """The attention's result; (streams, rows, channels)."""
    if runs_triton(inputs, dropout):
        from . import triton_blocks  # where it runs: Triton is no dependency

        result = triton_blocks.block_part(inputs, selection.blocks)
    else:
        result = block_part(inputs, selection.blocks, dropout)
    rest = inputs.whole & ~_chosen(selection.blocks, inputs.key_blocks)
    estimate = residual.part(rest)
    if estimate is not None:
        result = result + estimate
    if selection.clusters is not None:
        result = _with_clusters(inputs, result, selection.clusters, rest, residual, dropout)
    return result.mean()


def runs_triton(inputs: Inputs, dropout: float) -> bool:
    """Is it for the Triton kernel: on a GPU on which Triton works, without gradients?"""
    given = inputs.queries, inputs.keys, inputs.values
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    if dropout or trains or not inputs.queries.is_cuda:
        return False
    return obstacle(inputs.queries.device) is None


def _chosen(blocks: Tensor, count: int) -> Tensor:
    """Which key blocks a query block has; (streams, query blocks, key blocks)."""
    found = torch.zeros(*blocks.shape[:2], count + 1, dtype=torch.bool, device=blocks.device)
    return found.scatter_(2, blocks.where(blocks >= 0, count), True)[..., :count]


def block_part(inputs: Inputs, blocks: Tensor, dropout: float = 0.0) -> Part:
    """Attention of each query block over its key blocks.

    A block of queries at a time: its scores stay in the cache. The mask is evaluated for those
    key blocks alone that are seen in part, which come first.
    """
    within = torch.arange(inputs.size, device=blocks.device)
    partial = inputs.part.gather(2, blocks.clamp(min=0)) & (blocks >= 0)
    masked = partial.sum(dim=2).amax(dim=0).tolist()
    widths = (blocks >= 0).sum(dim=2).amax(dim=0).clamp(min=1).tolist()
    parts = []
    for i, (width, first) in enumerate(zip(widths, masked, strict=True)):
        chosen = blocks[:, i, :width]
        index = (chosen.clamp(min=0)[..., None] * inputs.size + within).flatten(1)
        rows = inputs.rows(i)
        keys, values = (inputs.gather(tensor, index) for tensor in (inputs.keys, inputs.values))
        there = inputs.valid.gather(1, index) & (chosen >= 0).repeat_interleave(inputs.size, 1)
        complete = bool(there.all())
        columns = first * inputs.size
        end = columns if complete else index.shape[1]
        scores = torch.bmm(rows, keys[:, :end].transpose(1, 2)).float()
        if first:
            allowed = _allowed(inputs, i, rows.shape[1], index[:, :columns])
            scores[..., :columns].masked_fill_(~allowed, -math.inf)
        if not complete:
            scores.masked_fill_(~there[:, None], -math.inf)
        found = [Part.of(scores, values[:, :end], dropout)] if end else []
        if end < index.shape[1]:
            found.append(Part.of_all(rows, keys[:, end:], values[:, end:], dropout))
        parts.append(reduce(Part.__add__, found))
    return Part.cat(parts)


def _allowed(inputs: Inputs, block: int, rows: int, keys: Tensor) -> Tensor:
    """May the rows of a query block attend to keys (streams, n)? (streams, rows, n)."""
    query = block * inputs.step + torch.arange(rows // inputs.groups, device=keys.device)
    keys = keys.clamp(max=inputs.mask.kv_length - 1)  # what fills up is masked as not valid
    allowed = inputs.mask.allowed(inputs.batch[:, None, None], query[:, None], keys[:, None])
    allowed = allowed.expand(inputs.streams, len(query), keys.shape[1])
    return allowed.repeat_interleave(inputs.groups, dim=1)


def _with_clusters(
    inputs: Inputs,
    result: Part,
    clusters: Clusters,
    rest: Tensor,
    residual: Residual,
    dropout: float,
) -> Part:
    """Add clusters to a result: each pair once, and the residual's estimate of it off."""
    streams = torch.arange(inputs.streams, device=rest.device)[:, None]
    members = _members(clusters.rows, inputs.queries.shape[1])
    others = _members(clusters.keys, inputs.keys.shape[1])
    for c in range(clusters.rows.shape[1]):
        rows, keys = clusters.rows[:, c], clusters.keys[:, c]
        query_block = rows // inputs.groups // inputs.step
        pairs = rest[streams[..., None], query_block[..., None], keys[:, None] // inputs.size]
        pairs = pairs & inputs.valid.gather(1, keys)[:, None]
        if c:  # not in an earlier cluster
            before = torch.bmm(
                members[streams, rows, :c].float(), others[streams, keys, :c].float().mT
            )
            pairs = pairs & (before == 0)
        queries = inputs.queries[streams, rows]
        scores = torch.bmm(queries, inputs.gather(inputs.keys, keys).mT).float()
        estimates = residual.scores(rows, keys)
        values = inputs.gather(inputs.values, keys)
        found = Part.of(scores.masked_fill(~pairs, -math.inf), values, dropout)
        if estimates is not None:
            found = found - Part.of(estimates.float().masked_fill(~pairs, -math.inf), values)
        held = Part(result.shift[streams, rows], result.weight[streams, rows],
                    result.total[streams, rows])  # fmt: skip
        result = result.replaced(streams, rows, held + found)
    return result


def _members(index: Tensor, count: int) -> Tensor:
    """Which clusters (streams, clusters, n) each of `count` is in; (streams, count, clusters)."""
    streams, clusters, _ = index.shape
    found = torch.zeros(streams, clusters, count, dtype=torch.bool, device=index.device)
    return found.scatter_(2, index, True).mT
