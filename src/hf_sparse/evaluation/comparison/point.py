"""One run of a comparison."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ComparisonPoint:
    """One method at one sparsity.

    Attributes:
        method: its name, or the name that its settings were given.
        setting: what was asked for: a fraction of zeros, or an n:m pattern.
        sparsity: fraction of zeros over all pruned weights; like what follows, None if it failed.
        score: what the evaluation gave.
        seconds: of pruning, as if it ran alone: measurements of the dense model that an earlier
            run made are counted as well; loading, copying and tokenising are not.
        bytes_dense: of the pruned weights before, in the model's dtype.
        bytes_stored: of the pruned weights on disk.
        bytes_resident: of the pruned weights in memory, on this machine.
        error: why it failed; None if it did not.
    """

    method: str
    setting: float | str
    sparsity: float | None = None
    score: float | None = None
    seconds: float | None = None
    bytes_dense: int | None = None
    bytes_stored: int | None = None
    bytes_resident: int | None = None
    error: str | None = None

    def share(self, count: int | None) -> float | None:
        """Bytes as a share of the dense weights'; None if it failed or pruned nothing."""
        return None if count is None or not self.bytes_dense else count / self.bytes_dense
