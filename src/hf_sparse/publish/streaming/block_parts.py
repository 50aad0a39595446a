"""What a block consists of, as an estimate counts it."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from math import prod

from transformers import PreTrainedModel

from ...config.sparse_config import SparseConfig
from ...core.patterns import NM, Unstructured
from ...layers.blocks import Block
from ...layers.select import Target
from ...pruning.plan import LayerPlan


def groups(targets: Iterable[Target]) -> list[tuple[int, list[Target]]]:
    """Layers that read the same input, with its length.

    Those of one parent with inputs of one length do, but for its last: the one that comes out.
    """
    by_parent: dict[str, list[Target]] = {}
    for target in targets:
        by_parent.setdefault(target.name.rpartition(".")[0], []).append(target)
    groups: list[tuple[int, list[Target]]] = []
    for members in by_parent.values():
        found = [[members[0]]]
        for before, target in pairwise(members):
            last = target is members[-1] and len(members) > 1
            if last or target.shape[1] != before.shape[1]:
                found.append([target])
            else:
                found[-1].append(target)
        groups += [(group[0].shape[1], group) for group in found]
    return groups


def _experts(model: PreTrainedModel) -> tuple[int, int]:
    """How many experts a block has, and how many of them a token goes to."""
    text = model.config.get_text_config()
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    count = next((n for name in names if (n := getattr(text, name, None))), 0)
    chosen = getattr(text, "num_experts_per_tok", None) or getattr(text, "moe_topk", None) or count
    return count, chosen


def share(members: list[Target], model: PreTrainedModel) -> float:
    """The share of the tokens that reach some layers: experts see those that are routed to them."""
    count, chosen = _experts(model)
    return chosen / count if count and "experts" in members[0].name.split(".") else 1.0


def idle(block: Block, model: PreTrainedModel) -> int:
    """Weights of a block that a token doesn't meet, on average."""
    count, chosen = _experts(model)
    if not count:
        return 0
    named = block.module.named_parameters()
    routed = sum(p.numel() for name, p in named if "experts" in name.split("."))
    return round(routed * (1 - chosen / count))


def packed_bytes(plan: LayerPlan, config: SparseConfig, itemsize: int) -> int:
    """Bytes of a layer as it is stored: a bit for each weight, and what is kept."""
    pattern, size = plan.pattern, prod(plan.target.shape)
    kept = size
    if isinstance(pattern, NM):
        kept = size * pattern.n // pattern.m
    elif isinstance(pattern, Unstructured):
        kept -= pattern.zeros(size)
    bits = 8 * itemsize if config.bits is None else config.bits
    return size // 8 + kept * bits // 8
