"""Adds up a layer's input statistics while calibration batches flow by, in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import SolveError
from ..core.precision import full_precision
from ..core.processes import Processes
from ..core.statistics import Needs, Statistics

# Rows kept of the inputs, to measure output errors on: enough for two digits, and small.
SAMPLE_ROWS = 512
# Tokens that are in fp32 at once, of a batch in half precision.
TILE_ROWS = 2048
# Tokens gathered before H is updated: a rank-256 product runs near the library's peak.
FLUSH_ROWS = 256
# H is symmetric: only tiles on and below the diagonal are computed, in strips of this many rows.
STRIP = 128
# Rows of H that are mirrored at once.
MIRROR_STRIP = 1024
# On a GPU: wide enough that the products are few and large.
GPU_STRIP = 2048


class StatisticsCollector:
    """Adds up one input's statistics over batches; `finish` freezes them.

    With `cross`, every batch comes with the same tokens' inputs in the dense model.

    Attributes:
        tokens: how many there were so far.
        columns: of the input.
    """

    def __init__(
        self, columns: int, needs: Needs, batches: int, device: torch.device, cross: bool = False
    ) -> None:
        self._needs, self.columns = needs, columns
        self._rows_per_batch = max(1, -(-SAMPLE_ROWS // batches))
        self._sample: list[Tensor] = []
        self._pending: list[Tensor] = []
        self._elsewhere = False  # are the sums another process's?
        self.tokens = 0
        self._squares = torch.zeros(columns, device=device)
        self._hessian = (
            torch.zeros(columns, columns, device=device) if needs >= Needs.HESSIAN else None
        )
        self._cross = torch.zeros(columns, columns, device=device) if cross else None

    def add(
        self, inputs: Float[Tensor, "tokens in"], dense: Float[Tensor, "tokens in"] | None = None
    ) -> None:
        """Count a batch's tokens; padding has been taken out before."""
        if inputs.shape[0] == 0:
            return
        step = max(1, inputs.shape[0] // self._rows_per_batch)
        # Copied: the model may go on to write into its activations.
        self._sample.append(inputs[::step][: self._rows_per_batch].to(torch.float32, copy=True))
        for start in range(0, inputs.shape[0], TILE_ROWS):
            tile = slice(start, start + TILE_ROWS)
            self._add_tile(inputs[tile], None if dense is None else dense[tile])

    def _add_tile(self, inputs: Tensor, dense: Tensor | None) -> None:
        rows = inputs.float()
        self.tokens += rows.shape[0]
        if self._cross is not None:
            assert dense is not None
            with full_precision():
                self._cross.addmm_(dense.float().T, rows)
        if self._hessian is None:
            self._squares += rows.square().sum(dim=0)
            return
        self._pending.append(rows)
        if sum(len(chunk) for chunk in self._pending) >= FLUSH_ROWS:
            self._flush()
        elif rows.data_ptr() == inputs.data_ptr():
            self._pending[-1] = rows.clone()

    def finish(self) -> Statistics:
        """The statistics of all tokens seen.

        Raises:
            SolveError: no token was seen, or an input was NaN or infinite.
        """
        if self.tokens == 0:
            raise SolveError("no calibration token reached it")
        if self._elsewhere:
            return Statistics(self.tokens, torch.cat(self._sample))
        if self._hessian is not None:
            self._flush()
            hessian = _mirrored(self._hessian).div_(self.tokens)
            squares = hessian.diagonal()
        else:
            hessian = None
            squares = self._squares / self.tokens
        if not bool(torch.isfinite(squares).all()):
            raise SolveError("its input activations are NaN or infinite, or overflow fp32 squared")
        norms = squares.sqrt() if self._needs >= Needs.COLUMN_NORMS else None
        cross = self._cross.div_(self.tokens) if self._cross is not None else None
        return Statistics(self.tokens, torch.cat(self._sample), norms, hessian, cross)

    @property
    def sampled(self) -> int:
        """Rows kept of the inputs."""
        return sum(map(len, self._sample))

    def share(
        self, processes: Processes, owner: int | None, tokens: int, sampled: Sequence[int]
    ) -> None:
        """Add up what all processes have counted of one input.

        Args:
            processes: each of them calls this.
            owner: where the sums are wanted, None for everywhere; elsewhere the number of tokens
                is all that is left.
            tokens: of all processes.
            sampled: rows that each has kept.
        """
        self._flush()
        sums = self._squares if self._hessian is None else self._hessian
        sample = sums.new_zeros(sum(sampled), self.columns)
        if self._sample:
            before = sum(sampled[: processes.rank])
            sample[before : before + self.sampled] = torch.cat(self._sample)
        for tensor in (sums, sample, self._cross):
            if tensor is not None:
                processes.sum(tensor, owner)
        self.tokens, self._sample = tokens, [sample]
        if owner not in (None, processes.rank):
            self._elsewhere, self._sample = True, [sample[:0].clone()]
            self._hessian = self._cross = None

    def _flush(self) -> None:
        if not self._pending:
            return
        rows = torch.cat(self._pending) if len(self._pending) > 1 else self._pending[0]
        self._pending.clear()
        assert self._hessian is not None
        strip = GPU_STRIP if rows.is_cuda else STRIP
        with full_precision():
            for start in range(0, rows.shape[1], strip):
                end = min(start + strip, rows.shape[1])
                self._hessian[start:end, :end].addmm_(rows[:, start:end].T, rows[:, :end])


def _mirrored(matrix: Tensor) -> Tensor:
    """The symmetric matrix whose lower triangle this one has, in its place."""
    for start in range(0, len(matrix), MIRROR_STRIP):
        end = start + MIRROR_STRIP
        tile = matrix[start:end, start:end]
        tile.copy_(tile.tril() + tile.tril(-1).T)
        matrix[start:end, end:] = matrix[end:, start:end].T
    return matrix
