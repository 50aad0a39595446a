"""`preview_head`: the output head's scores from 4-bit codes, the best candidates' exactly.

After SLIDE (Chen et al. 2020): of a vocabulary's scores few are needed, so those few are found
cheaply and then computed. What finds them is no hash but the head itself, rounded to 4 bits and
multiplied by rounded inputs: a quarter of bf16's bytes, read in order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..core.grids import Grid
from ..core.logging import get_logger
from ..core.untrusted_text import brief
from ..kernels.cpu import library
from ..kernels.cpu.integer.weight import IntegerWeight, pack
from ..kernels.cpu.product import Product
from ..kernels.operator import unwatched
from .head import HeadLinear

logger = get_logger(__name__)

GRID = Grid(4, 64, True)


@dataclass(frozen=True)
class Preview:
    """A head's rounded weight, and how many candidates it finds.

    Attributes:
        codes: makes all scores, rounded.
        candidates: how many of them are computed exactly.
        weight, version: what was rounded, and the count of writes to it then.
        sums: of the bits of each of its rows, for writes that aren't counted.
    """

    codes: Product[IntegerWeight]
    candidates: int
    weight: Tensor
    version: int
    sums: Tensor

    @classmethod
    def of(cls, weight: Float[Tensor, "vocabulary in"], candidates: int) -> Preview:
        """Round a head's weight."""
        matrix = weight.detach().float()
        rounded = GRID.fit(matrix, search=False).round(matrix)
        width = GRID.width(matrix.shape[1])
        codes = pack(rounded.codes.to(torch.int8), rounded.scales.scale, width)
        return cls(Product(codes), candidates, weight, weight._version, _sums(weight))

    def is_of(self, weight: Tensor) -> bool:
        """Has the weight not been replaced since, nor written to in a way that torch counts?"""
        return self.weight is weight and self.version == weight._version

    def scores(
        self, x: Float[Tensor, "*one in"], bias: Tensor | None
    ) -> Float[Tensor, "*one vocabulary"] | None:
        """`F.linear(x, weight, bias)` for the candidates; the preview's scores for all others,
        below the lowest candidate's: so none of them passes a candidate. None if a candidate's
        row isn't what it was, as after PEFT's merging, which torch doesn't count."""
        y = self.codes(x, bias)
        row = y.view(-1)
        best = row.topk(self.candidates).indices
        rows = self.weight[best]
        if not torch.equal(_sums(rows), self.sums[best]):
            return None
        own_bias = None if bias is None else bias[best]
        exact = F.linear(x.reshape(1, -1), rows, own_bias).view(-1)
        below = torch.nextafter(exact.min(), exact.new_tensor(-math.inf))
        row.clamp_(max=float(below))
        row[best] = exact
        return y

    def __reduce__(self) -> tuple[Any, ...]:
        return Preview.of, (self.weight, self.candidates)  # copies count their own writes


def _sums(rows: Float[Tensor, "rows in"]) -> Int64[Tensor, "rows"]:
    """Of each row's bits, as integers."""
    integers = torch.int16 if rows.element_size() == 2 else torch.int32
    return rows.detach().contiguous().view(integers).sum(dim=1)


class PreviewedHead(nn.Linear):
    """An `nn.Linear` whose scores for one token come from a preview where nothing watches.

    A layer becomes one by its class alone: parameters, ties, hooks and names stay as they are.

    Attributes:
        preview: its weight's.
        before: the class that it had.
    """

    preview: Preview
    before: type[nn.Linear]

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        trains = torch.is_grad_enabled() and weight.requires_grad
        if trains or not unwatched(input, bias) or not _is_one_row(input, weight):
            return super().forward(input)
        scores = self.preview.scores(input, bias) if self.preview.is_of(weight) else None
        if scores is None:
            logger.warning_once(  # type: ignore[attr-defined]
                "the head's weight was written to, so all its scores are exact again: call "
                "hf_sparse.preview_head once more"
            )
            return super().forward(input)
        return scores


def _is_one_row(x: Tensor, weight: Tensor) -> bool:
    return (
        x.is_cpu
        and weight.is_cpu
        and x.numel() == x.shape[-1] == weight.shape[1]
        and x.dtype == weight.dtype
        and not torch.is_autocast_enabled("cpu")
    )


@torch.no_grad()
def preview_head(model: nn.Module, candidates: int | None = 64) -> None:
    """Let a model's output head compute the scores of a token's best candidates alone.

    While a single sequence is decoded on a CPU, a copy of the head's weight in 4 bits tells the
    `candidates` highest scores, and those are computed as without it. All others are the copy's,
    lowered to below the lowest candidate's. So greedy decoding, and sampling with
    `top_k` of at most `candidates`, see exact scores, unless the copy misses a candidate; what
    sums over the whole vocabulary, as sampling without `top_k` does, sees approximate ones.
    Several tokens or sequences at once, labels, gradients and tracers get exact scores of all. It
    is not saved with the model, and holds for the weight as it is: written to by an optimiser,
    `load_state_dict` or a merged adapter, or with an adapter beside it, the head is exact again,
    with a warning.

    Args:
        model: with an `nn.Linear` as its head, on the CPU; sparse or dense.
        candidates: how many, below the size of the vocabulary. None: all are exact again.

    Raises:
        ConfigError: it has no such head, or this machine can't multiply the copy. Nothing has
            changed then.
    """
    find = getattr(model, "get_output_embeddings", None)
    head: Any = None if find is None else find()
    before = head.before if isinstance(head, PreviewedHead) else type(head)
    if candidates is None:
        drop_preview(head)
        return
    if before not in (nn.Linear, HeadLinear):
        found = "no output head" if head is None else f"a {type(head).__name__} as its output head"
        raise ConfigError(f"{type(model).__name__} has {found}: a preview needs an nn.Linear")
    vocabulary = head.weight.shape[0]
    if type(candidates) is not int or not 0 < candidates < vocabulary:
        raise ConfigError(
            f"candidates={brief(candidates)} must be an integer from 1 to below {vocabulary}, the "
            "model's vocabulary"
        )
    if obstacle := _obstacle(head):
        raise ConfigError(f"the head of {type(model).__name__} can't be previewed: {obstacle}")
    preview = Preview.of(head.weight, candidates)
    drop_preview(head)
    head.__class__ = PreviewedHead
    head.__dict__ |= {"preview": preview, "before": before}


def drop_preview(head: Any) -> None:
    """Make a head that has a preview what it was."""
    if isinstance(head, PreviewedHead):
        head.__class__ = head.before  # type: ignore[assignment]
        del head.preview, head.before


def _obstacle(head: nn.Linear) -> str | None:
    weight = head.weight
    if hasattr(head, "_hf_hook") or weight.device.type != "cpu":
        return f"its weight is offloaded or on {weight.device}, a preview runs on CPUs"
    if weight.dtype not in library.FLOATS:
        return f"its weight is {weight.dtype}"
    if weight.is_inference():
        return "it was made in torch.inference_mode(), where writes aren't counted"
    if not weight.isfinite().all():
        return "its weight has values that are NaN or infinite"
    if not library.available():
        return library.unavailable_reason()
    if library.integer_path() == library.PLAIN_PATH:
        return "this CPU has no instructions for products of bytes that are known here"
    return None
