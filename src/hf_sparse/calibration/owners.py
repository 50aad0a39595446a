"""Which process solves which layer, when several prune one model.

A layer's sums go to its owner alone, so that no process holds the Hessians of all. Layers with one
input have one owner: its factor is computed once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from ..core.errors import ProcessError
from ..core.processes import ALONE, Processes
from ..core.statistics import Needs


@dataclass
class Owners:
    """Of one run.

    Attributes:
        processes: those that share the work.
        needs: what the solver asks for, which tells what a layer costs.
    """

    processes: Processes = ALONE
    needs: Needs = Needs.HESSIAN
    _owner: dict[str, int] = field(default_factory=dict)
    _work: list[float] = field(default_factory=list)

    def __getitem__(self, name: str) -> int:
        """The rank of a layer's owner."""
        return self._owner[name]

    def is_own(self, name: str) -> bool:
        """Does this process solve the layer?"""
        return self._owner[name] == self.processes.rank

    def of(self, names: Iterable[str]) -> int | None:
        """The owner of all these layers; None if there are several."""
        owners = {self._owner[name] for name in names}
        return owners.pop() if len(owners) == 1 else None

    def assign(self, groups: Iterable[Collection[str]], layers: Mapping[str, nn.Module]) -> None:
        """Give each layer that has no owner one; the same everywhere, and the heaviest first.

        Args:
            groups: names of layers that have one input.
            layers: by name.
        """
        self._work = self._work or [0.0] * self.processes.size
        left = [[name for name in group if name not in self._owner] for group in groups]
        costs = {
            tuple(names): solving_cost(_shapes(names, layers), self.needs)
            for names in left
            if names
        }
        for names, cost in sorted(costs.items(), key=lambda item: (-item[1], item[0])):
            owner = self._work.index(min(self._work))
            self._work[owner] += cost
            self._owner.update(dict.fromkeys(names, owner))

    def check_together(self, block: str) -> None:
        """Raise a ProcessError unless all processes stand in front of one block."""
        for rank, other in enumerate(self.processes.gather(block)):
            if other != block:
                raise ProcessError(
                    f"the samples of process {rank} reach {other or 'the end'}, and those of "
                    f"process {self.processes.rank} {block or 'the end'}: samples of several kinds "
                    "can't be split, prune in one process"
                )


def solving_cost(shapes: Sequence[tuple[int, ...]], needs: Needs) -> float:
    """Operations, nearly, for layers of one input: a loop over columns updates those behind, and a
    factor is cubic.

    Args:
        shapes: (out, in) of each layer.
        needs: what the solver asks for.
    """
    if needs < Needs.HESSIAN:
        return float(sum(rows * columns for rows, columns, *_ in shapes))
    factor = max(columns for _, columns, *_ in shapes) ** 3
    return float(factor + sum(rows * columns**2 for rows, columns, *_ in shapes))


def _shapes(names: Iterable[str], layers: Mapping[str, nn.Module]) -> list[tuple[int, ...]]:
    return [tuple(layers[name].weight.shape) for name in names]  # type: ignore[union-attr,arg-type]
