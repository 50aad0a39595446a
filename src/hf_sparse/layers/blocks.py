"""What is pruned at once: the blocks of a model, found from its structure or named by the user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..core.errors import TargetError
from ..core.module_names import ends_with, near_names
from . import SparseExperts


@dataclass(frozen=True)
class Block:
    """A module that is pruned at once, with the names of the targets inside it."""

    name: str
    module: nn.Module
    targets: tuple[str, ...]


def find_blocks(
    model: nn.Module, targets: Sequence[str], blocks: Sequence[str] | None = None
) -> list[Block]:
    """Split the targets into blocks.

    A block is the outermost module around a target whose class the model names in
    `_no_split_modules`, else the outermost element of an `nn.ModuleList` that is no mere container
    (those are never called), else the experts that it belongs to. A target in none of them is a
    block of its own; so is one outside the blocks that `blocks` names, or outside their experts,
    and one that several blocks share, which is pruned on what all of them hand to it.

    Args:
        model: the model to look through.
        targets: names of layers.
        blocks: regexes of the last components of the blocks' names; None to find them.

    Raises:
        TargetError: a regex of `blocks` matches no module, or none that has a target; or one block
            is inside another.
    """
    every = model.named_modules(remove_duplicate=False)
    experts = {name for name, module in every if isinstance(module, SparseExperts)}
    found = _found(model) if blocks is None else [_named(model, targets, blocks)]
    ranks = [*found, experts]
    all_names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        all_names.setdefault(module, []).append(name)
    modules = {name: module for module, names in all_names.items() for name in names}

    def block_of(target: str) -> str:
        around = _ancestors(target)
        return next((a for names in ranks for a in around if a in names), target)

    grouped: dict[str, list[str]] = {}
    for target in targets:
        owners = {modules[block_of(name)] for name in all_names[modules[target]]}
        grouped.setdefault(block_of(target) if len(owners) == 1 else target, []).append(target)
    return [Block(n, modules[n], tuple(t)) for n, t in grouped.items()]


def _found(model: nn.Module) -> list[set[str]]:
    """The blocks of a model, those that come first before the others."""
    whole: set[str] = set()
    for module in model.modules():
        whole.update(getattr(module, "_no_split_modules", None) or ())
    by_class = {
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if name and type(module).__name__ in whole
    }
    by_list = {
        f"{name}.{child}".lstrip(".")
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.ModuleList)
        for child, element in module.named_children()
        if not is_container(element)
    }
    return [by_class, by_list]


def _named(model: nn.Module, targets: Sequence[str], blocks: Sequence[str]) -> set[str]:
    """The modules that regexes name as blocks."""
    inside = {a for target in targets for a in _ancestors(target)}
    every = model.named_modules(remove_duplicate=False)
    callable_ = [name for name, module in every if name and not is_container(module)]
    chosen: set[str] = set()
    for regex in blocks:
        found = {name for name in callable_ if ends_with(regex, name)}
        if not found:
            raise TargetError(
                f"blocks={regex!r} matches none of the {len(callable_)} modules of "
                f"{type(model).__name__} that are called; "
                f"{near_names(regex, callable_, 'modules')}. A regex must match the last whole "
                "components of a block's name, e.g. 'layers.[0-9]+'"
            )
        if not found & inside:
            raise TargetError(
                f"blocks={regex!r} matches {', '.join(sorted(found)[:4])}, in which no layer is to "
                f"be pruned; those that are, are e.g. {', '.join(targets[:4])}"
            )
        chosen |= found & inside
    for name in sorted(chosen):
        outer = next((a for a in _ancestors(name) if a != name and a in chosen), None)
        if outer is not None:
            raise TargetError(
                f"blocks={list(blocks)!r} matches {name} and also {outer}, which it is part of: a "
                "block can't be inside another, so match only one of the two"
            )
    return chosen


def is_container(module: nn.Module) -> bool:
    """Is it never called, like an `nn.ModuleList`?"""
    return type(module).forward is nn.Module.forward


def _ancestors(name: str) -> list[str]:
    """The names of the modules around a module, outermost first, and its own."""
    return [name[:i] for i, letter in enumerate(name) if letter == "."] + [name]
