"""The arguments of `SparseConfig` that say how a pruned model computes; see `arguments`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..core.attention_settings import AttentionSettings, check_attention
from ..core.preferences import PREFERENCES
from .argument import Argument
from .checks import choice, optional, share
from .layer_arguments import STORAGE, LayerArguments

ATTENTION = "attention"


@dataclass(eq=False, repr=False)
class RunArguments(LayerArguments):
    """The arguments as fields, but for those of mixtures of experts."""

    input_sparsity: Argument[float | None, float | None] = Argument(
        None,
        "Share of each layer's inputs that count as 0, 0 < s < 1: those whose size is at most a "
        "threshold, one number a layer, below which that share of the calibration data's are. On a "
        "CPU a token's products then read the other inputs' weights alone. It needs calibration "
        "data, and holds for layers of sparsity 0 too.",
        STORAGE,
        optional(share),
    )
    prefer: Argument[str, str] = Argument(
        "auto",
        'What sparse layers are to be on the machine that runs them: "memory", packed wherever a '
        'kernel can multiply them; "speed", packed or dense, whichever is faster for a token; '
        '"auto", packed unless that makes the model clearly slower. It holds for a sparse '
        "checkpoint as well, if the config is passed to `from_pretrained`, and `hf_sparse.prefer` "
        "changes it later.",
        STORAGE,
        partial(choice, allowed=PREFERENCES),
    )
    activations: Argument[str | None, str | None] = Argument(
        None,
        'What CPUs may round the inputs of layers with `bits` to: "int8", in blocks of at most 32 '
        "inputs, which makes their products much faster and changes them by up to half a step "
        "of max |x| / 127. Pruning and saved weights are the same without. It holds for a sparse "
        "checkpoint as well, if the config is passed to `from_pretrained`, and "
        "`hf_sparse.round_activations` changes it later.",
        STORAGE,
        partial(choice, allowed=(None, "int8")),
        "nothing",
    )
    attention: Argument[
        str | Mapping[str, Any] | AttentionSettings | None, AttentionSettings | None
    ] = Argument(
        None,
        'Sparse attention of the model: a method such as "hs_block", or a dict with its settings, '
        '{"method": "hs_block", "keys": 1024}. Saved with the model, which has it again where '
        "hf_sparse loads it. With sparsity 0 it is all that changes. It holds for a sparse "
        "checkpoint as well, if the config is passed to `from_pretrained`, and "
        "`hf_sparse.use_attention` changes it later.",
        ATTENTION,
        check_attention,
        "exact",
        shell_help="Sparse attention of the model: a method such as hs_block, or JSON with its "
        'settings, \'{"method": "hs_block", "keys": 1024}\'. Saved with the model, which has it '
        "again where hf_sparse loads it. With sparsity 0 it is all that changes.",
    )
