"""Merging a PEFT adapter into a sparse model that stays sparse."""

from .report import LayerMerge, MergeReport
from .run import merge_adapter

__all__ = ["LayerMerge", "MergeReport", "merge_adapter"]
