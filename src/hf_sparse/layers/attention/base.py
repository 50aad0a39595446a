"""What a selector and a residual are: the one picks pairs, the other stands for the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...core.attention_settings import AttentionSettings
from .inputs import Inputs, Part


@dataclass(frozen=True)
class Clusters:
    """Pairs of rows and keys that have been put together; each cluster's rows with its keys.

    Attributes:
        rows: indices of rows; (streams, clusters, rows).
        keys: indices of keys; (streams, clusters, keys).
    """

    rows: Tensor
    keys: Tensor


@dataclass(frozen=True)
class Selection:
    """The pairs that are attended to exactly.

    Attributes:
        blocks: key blocks of each query block, those that it sees in part first, -1 where there
            are fewer; (streams, query blocks, n).
        clusters: more pairs, of blocks that see each other wholly.
    """

    blocks: Tensor
    clusters: Clusters | None = None


class Selector(ABC):
    """Picks pairs. What a query block sees of a key block in part alone has to be among them.

    Attributes:
        name: how users call it.
        learns: it needs `learned` tensors, which `learn` makes.
    """

    name: ClassVar[str]
    learns: ClassVar[bool] = False

    @abstractmethod
    def select(
        self, inputs: Inputs, settings: AttentionSettings, learned: Mapping[str, Tensor]
    ) -> Selection:
        """The pairs of one attention call."""

    def learn(
        self, queries: Tensor, keys: Tensor, settings: AttentionSettings
    ) -> dict[str, Tensor]:
        """What it needs to know of a layer.

        Args:
            queries: scaled, of calibration data; (key heads, samples, channels).
            keys: those before the same queries in the same texts; likewise.
            settings: the model's.
        """
        return {}


class Residual(ABC):
    """Stands for pairs of blocks that see each other wholly.

    Attributes:
        name: how users call it.
    """

    name: ClassVar[str]

    @abstractmethod
    def __init__(self, inputs: Inputs, settings: AttentionSettings) -> None:
        """For one attention call."""

    @abstractmethod
    def part(self, rest: Tensor) -> Part | None:
        """Its estimate of the attention over pairs of blocks, (streams, query blocks, key blocks);
        None if it has none."""

    @abstractmethod
    def scores(self, rows: Tensor, keys: Tensor) -> Tensor | None:
        """What it takes the scores of some pairs for: rows (streams, n) and keys (streams, m) give
        (streams, n, m); None if its part has nothing of them."""
