"""The dense output head of a sparse model, multiplied natively while it decodes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..kernels.cpu import dense_row, library

# Below, one measurement's noise decides.
LEAST = 1.05


class HeadLinear(nn.Linear):
    """An `nn.Linear` whose product of one token comes from `kernels.cpu.dense_row`.

    A layer becomes one by its class alone: parameters, ties, hooks and names stay as they are.

    Attributes:
        speedup: over `F.linear` at one token, measured on this machine.
    """

    speedup: float

    def forward(self, input: Tensor) -> Tensor:
        if not dense_row.fits(input, self.weight):
            return super().forward(input)
        y: Tensor = dense_row.dense_row(input, self.weight)
        return y if self.bias is None else y + self.bias


def speed_up_head(model: nn.Module) -> None:
    """Let a transformers model's head use the native product if that measures faster here."""
    find = getattr(model, "get_output_embeddings", None)
    head: Any = None if find is None else find()
    if type(head) is not nn.Linear or hasattr(head, "_hf_hook"):
        return
    weight = head.weight
    if weight.device.type != "cpu" or weight.dtype not in library.HALVES:
        return
    speedup = dense_row.over_dense(weight)
    if speedup is not None and speedup >= LEAST:
        head.__class__ = HeadLinear
        head.__dict__["speedup"] = speedup


def restore_head(model: nn.Module) -> None:
    """Undo `speed_up_head`."""
    for module in model.modules():
        if isinstance(module, HeadLinear):
            del module.speedup
            module.__class__ = nn.Linear  # type: ignore[assignment]
