"""`hf-sparse explain`: which kernels this machine uses."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..command import Command
from ..models import DeviceMap, Dtype, Model, Prefer, Revision, load, read_config, require_sparse

if TYPE_CHECKING:
    from hf_sparse import Explanation


@dataclass(frozen=True)
class Explained:
    """An explanation that can be printed as JSON."""

    explanation: Explanation

    def to_dict(self) -> dict[str, Any]:
        """Its values, totals included."""
        totals = ("bytes_dense", "bytes_resident")
        return {
            **asdict(self.explanation),
            **{name: getattr(self.explanation, name) for name in totals},
        }

    def __str__(self) -> str:
        return str(self.explanation)


def explain(
    model: Model,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    prefer: Prefer = None,
) -> Explained:
    """Which kernel each layer uses here, and why.

    Bytes are shares of the dense weight's, speed is over the dense product, by number of tokens.
    """
    require_sparse(model, read_config(model, revision))
    import hf_sparse

    return Explained(hf_sparse.explain(load(model, revision, dtype, device_map, prefer=prefer)[0]))


COMMAND = Command(
    "explain",
    explain,
    ("hf-sparse explain opt-sparse", "hf-sparse explain me/opt-sparse --dtype bfloat16 --json"),
)
