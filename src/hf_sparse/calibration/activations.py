"""What passes hold between two blocks: where it waits, and what a later run needs to go on there.

A later run can't enter a model's forward pass in the middle. It starts each pass anew, and blocks
that are finished hand out what they made of the batch in the run before, without computing. Of the
blocks of one list only the last one's outputs are kept: it stands in for those before it, whose
outputs a model that is a chain uses for nothing else. Whether that holds is checked by the digests
of all that the passes then hand to the next block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_flatten

from ..core.errors import CalibrationError, CheckpointError, SaveError
from ..core.processes import ALONE, Processes
from .offload import ACCELERATORS, Parked

# A batch's number, and whether its pass is the dense model's.
Pass = tuple[int, bool]


class Activations:
    """Of one run; as it is made without arguments they wait in memory and nothing is kept.

    Args:
        waiting: the folder for what waits, in files; None for memory.
        kept: the folder for outputs of finished blocks; None to keep none.
        outputs: of the blocks that a run before has finished, the block whose outputs stand for
            them, by name.
        standing: that run's `standing` behind the last of them.
        processes: that share the batches, which are numbered over all of them.

    Attributes:
        standing: the digest of what each pass hands to the block that it stands in front of, after
            that block's name; by the pass's name, and only if outputs are kept.
    """

    def __init__(
        self,
        waiting: Path | None = None,
        kept: Path | None = None,
        outputs: Mapping[str, str] | None = None,
        standing: Mapping[str, str] | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self._processes = processes
        self._waiting, self._kept = waiting, kept
        self._outputs = dict(outputs or {})
        self._expected = dict(standing or {})
        self.standing: dict[str, str] = {}

    @property
    def finished(self) -> Collection[str]:
        """Names of the blocks that are not run any more."""
        return self._outputs.keys()

    @property
    def keeps(self) -> bool:
        """Are outputs kept?"""
        return self._kept is not None

    def parked(self, value: Any, keep: frozenset[int]) -> Parked:
        """The storages of a call's arguments, see `Parked`."""
        return Parked(value, keep, ACCELERATORS, self._waiting)

    def arrive(self, running: Pass, block: str, arguments: Any) -> None:
        """A pass stands in front of a block.

        Raises:
            CalibrationError: a run before left it with something else.
        """
        if not self.keeps:
            return
        name, found = self._name(running), f"{block} {digest(arguments)}"
        if self._expected.pop(name, found) != found:
            raise CalibrationError(
                f"the run can't go on at {block}: what reaches it is not what reached it before, "
                "since the model uses more of the blocks before than the last one's outputs. Begin "
                "anew, see hf_sparse.clear_checkpoint"
            )
        self.standing[name] = found

    def leave(self, running: Pass, block: str, output: Any) -> None:
        """A pass has come through a pruned block: keep what it made.

        Raises:
            SaveError: there is no room, or the like.
        """
        if self._kept is not None:
            self.standing.pop(self._name(running), None)
            tensors: dict[str, Tensor] = {}
            _flatten(output, "", tensors)
            path = self._file(block, running)
            try:
                save_file(tensors, path)
            except (OSError, SafetensorError) as error:
                raise SaveError(
                    f"what {block} made of a batch can't be written to {str(path.parent)!r}: "
                    f"{error}; the blocks before it are there: run it again to go on from there"
                ) from error

    def needed(self, outputs: Mapping[str, str]) -> list[Path]:
        """The files without which a run can't go on behind some blocks, see `outputs`."""
        if self._kept is None:
            return []
        every = self._kept.iterdir()
        return [path for path in every if path.name.rsplit("@", 1)[0] in outputs.values()]

    def replay(self, running: Pass, block: str) -> Any:
        """What a block that is finished made of a batch, or the one that stands in for it."""
        path = self._file(self._outputs[block], running)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
            return _nested(tensors)
        except Exception as error:  # RecursionError, too
            raise CheckpointError(f"{path}: it can't be read: {error!r:.200}") from None

    def _file(self, block: str, running: Pass) -> Path:
        """Where a block's outputs of a batch are kept."""
        assert self._kept is not None
        return self._kept / f"{block}@{self._name(running)}.safetensors"

    def _name(self, running: Pass) -> str:
        batch, dense = self._processes.number(running[0]), running[1]
        return f"{batch} dense" if dense else str(batch)


def digest(value: Any) -> str:
    """SHA-256 of the tensors and plain values in nested arguments."""
    found = hashlib.sha256()
    for leaf in tree_flatten(value)[0]:
        if isinstance(leaf, Tensor):
            found.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            found.update(
                leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            )
        elif leaf is None or isinstance(leaf, (bool, int, float, str)):
            found.update(repr(leaf).encode())
    return found.hexdigest()


def _flatten(value: Any, key: str, found: dict[str, Tensor]) -> None:
    """A block's output under keys that tell its form: T a tensor, N none, 0, 1, ... of a tuple."""
    if isinstance(value, Tensor):
        found[f"{key}T"] = value.detach().clone(memory_format=torch.contiguous_format)
    elif value is None:
        found[f"{key}N"] = torch.zeros(())
    elif isinstance(value, tuple) and type(value) is tuple:
        for place, item in enumerate(value):
            _flatten(item, f"{key}{place}.", found)
    else:
        raise CalibrationError(
            f"a block's output holds a {type(value).__name__}, which can't be kept for a later "
            "run: prune without checkpoint_dir"
        )


def _nested(found: Mapping[str, Tensor]) -> Any:
    """What `_flatten` took apart."""
    if "T" in found:
        return found["T"]
    if "N" in found:
        return None
    parts: dict[int, dict[str, Tensor]] = {}
    for key, tensor in found.items():
        place, _, rest = key.partition(".")
        parts.setdefault(int(place), {})[rest] = tensor
    return tuple(_nested(parts[place]) for place in sorted(parts))
