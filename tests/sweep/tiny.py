"""Tiny random configurations of any model type, made from its config class's own fields.

Every width becomes one of few numbers that divide each other (hidden size 64 = 4 heads of 16), in
all sub-configs alike, so that what must agree between fields still does. A field that no rule
names keeps its default. What the rules can't know stands in `OVERRIDES`, by model type.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from overrides import OVERRIDES
from transformers import CONFIG_MAPPING, PreTrainedConfig

VOCABULARY = 160
FIRST_FREE_ID = 100  # special tokens with larger ids move to this one and those above it

# The first pattern that matches a whole field name decides; None keeps the default.
RULES: tuple[tuple[str, int | None], ...] = (
    (r"type_vocab_size|max_2d_position_embeddings|.*kernel.*|.*stride.*", None),
    (r".*vocab_size.*", VOCABULARY),
    (r"adapter_.*_(size|dim)", 64),
    (r"num_(kv_shared|nextn_predict|mtp)_layers|mtp_num_hidden_layers", 0),
    (r"(first_k|num)_dense.*|moe_layer_start_index", 1),
    (r"max_window_layers", 1),
    (r".*(layer_interval|every_n_layers|layer_period|layer_offset|sparse_step).*", None),
    (r".*experts?_per_tok(en)?|.*top_?k|moe_k", 2),
    (r"(num|n)_(expert_)?groups?|topk_group", 1),
    (r".*(num|n)_.*experts|num_experts", 4),
    (r".*shared_experts", 1),
    (r".*(layers?|depth|num_blocks|num_self_attends_per_block)", 2),
    (r".*(kv_heads|key_value_heads|key_heads|value_heads|query_groups)", 2),
    (r"mamba_(d_head|head_dim|headdim)", 32),
    (r".*(head_dim|head_size|d_kv|kv_channels|dim_head|d_head|headdim|rotary_dim)", 16),
    (r".*heads?(_count)?", 4),
    (r"num_filters", 4),
    (r".*lora_rank|.*rank", 16),
    (r"moe_intermediate_size|.*expert.*(intermediate|hidden|ffn).*size", 32),
    (r".*(intermediate|ffn|d_ff|dim_ff|inner|mlp_dim|feed_forward|dff).*", 96),
    (r".*(hidden_size|d_model|n_embd|emb(ed)?_dim|embedding_size|(^|_)dim|hidden_dim).*", 64),
    (r".*(proj.*_(size|dim)|emb_size|output_dim|lru_width|d_latents|embed_proj_dim)", 64),
    (r".*(d_state|state_size)", 16),
    (r".*max_(position|source_position|target_position).*|n_positions|n_ctx|max_seq_len", 128),
    (r".*(sliding_window|chunk_size|attention_window.*|local_attention)", 8),
    (r"image_size", 32),
    (r"mm_tokens_per_image", 4),
    (r"patch_size", 8),
)
HEAD_DIM, NUM_HEADS = 16, 4


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A configuration of a registered type that builds a model of some ten thousand weights."""
    changes = OVERRIDES.get(model_type, {})
    default = default_config(model_type)
    if changes.get("as it is"):
        return default
    return _shrunk(default, {k: v for k, v in changes.items() if k != "default"}, {})


def default_config(model_type: str) -> PreTrainedConfig:
    """A type's own default, with the arguments that it can't do without."""
    return CONFIG_MAPPING[model_type](**OVERRIDES.get(model_type, {}).get("default", {}))


def _shrunk(
    default: PreTrainedConfig, changes: Mapping[str, Any], ids: dict[int, int]
) -> PreTrainedConfig:
    """The same kind of config with small numbers; `changes` win, nested ones by dicts."""
    values: dict[str, Any] = {}
    names = _parameters(type(default))
    kept_layers = _one_layer_of_each_kind(default)
    given = _given(default)

    def heads_of(name: str) -> int | None:
        return vars(default).get(name.replace("key_value", "attention"))

    by_stage = any(hasattr(default, name) for name in ("depths", "depth"))
    stages = (
        len(default.depths) if isinstance(getattr(default, "depths", None), list | tuple) else 0
    )
    layers = next((n for n in map(vars(default).get, LAYER_COUNTS) if n), None)
    for name, value in vars(default).items():
        if name not in names:
            continue
        if isinstance(value, PreTrainedConfig):
            values[name] = _shrunk(value, changes.get(name, {}), ids)
        elif name in ("rope_parameters", "rope_scaling"):
            small = _rope(value)
        elif name.endswith("num_key_value_heads") and value in (None, heads_of(name)):
            small = NUM_HEADS  # multi-head, or latent attention, stays so
        elif name in LAYER_COUNTS and value == stages:
            small = value
        elif name == "vocab_size" and value is None:
            small = VOCABULARY
        elif name == "head_dim" and value is None:
            small = HEAD_DIM
        else:
            small = _small(name, value, ids, kept_layers, None if by_stage else layers)
        # What is unchanged may be derived anew, unless it is there in place of a default.
        if not isinstance(value, PreTrainedConfig) and (small != value or name in given):
            values[name] = small
    for name, value in changes.items():
        if not isinstance(value, dict) or not isinstance(values.get(name), PreTrainedConfig):
            values[name] = value
    return type(default)(**values)


def _small(
    name: str, value: Any, ids: dict[int, int], kept_layers: list[int] | None, layers: int | None
) -> Any:
    if isinstance(value, list | tuple) and value:
        return _small_list(name, list(value), ids, kept_layers, layers)
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if re.fullmatch(r".*(_id|_ids|token|token_index|_index)", name):
        return ids.setdefault(value, FIRST_FREE_ID + len(ids)) if value >= FIRST_FREE_ID else value
    if kept_layers is not None and name in LAYER_COUNTS:
        return len(kept_layers)
    small = next((small for rule, small in RULES if re.fullmatch(rule, name)), None)
    return value if small is None else min(small, value)


LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")


def _small_list(
    name: str,
    value: list[Any],
    ids: dict[int, int],
    kept_layers: list[int] | None,
    layers: int | None,
) -> list[Any]:
    """Per layer: the layers that are kept. Per stage: one layer each, widths that double."""
    if name.endswith(("_id", "_ids")):
        return [_small(name, v, ids, None, None) for v in value]
    if len(value) == layers:
        kept = kept_layers or [i for i in range(2) if i < len(value)]
        return [_small(name, value[i], ids, None, None) for i in kept]
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        return value
    if re.fullmatch(".*(feature_layers?|attn_indexes|target_layers)", name) and min(value) >= 0:
        return [sorted(value[:2]).index(v) for v in value[:2]]  # of the two layers that are left
    if re.fullmatch("depths?|.*layers|.*num_blocks", name):
        return [1] * len(value)
    if "heads" in name:
        return [min(2**i, 4) for i in range(len(value))]
    if re.search(r"hidden_sizes|embed_dim|dims|conv_dim|downsample_channels", name):
        return [max(8, min(64, v * 64 // max(value) // 8 * 8)) for v in value]
    return value


def _one_layer_of_each_kind(config: PreTrainedConfig) -> list[int] | None:
    """Indices of the layers to keep where a config lists their kinds; at least two."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if not isinstance(kinds, list | tuple) or len(kinds) < 2:
        return None
    first = {kind: i for i, kind in reversed(list(enumerate(kinds)))}
    kept = set(first.values())
    kept |= {next(i for i in range(len(kinds)) if i not in kept)} if len(kept) < 2 else set()
    return sorted(kept)


def _rope(value: Any) -> Any:
    """Rope parameters with sections that fit heads of 16."""
    if not isinstance(value, dict):
        return value
    small = {k: _rope(v) for k, v in value.items()}
    if isinstance(small.get("mrope_section"), list | tuple):
        small["mrope_section"] = [4, 2, 2]
    return small


def _given(config: PreTrainedConfig) -> set[str]:
    """Numbers that differ from the class's own: not derived from others, but chosen."""
    numbers = {f.name: f.default for f in fields(config) if isinstance(f.default, int | float)}
    return {name for name, default in numbers.items() if vars(config).get(name) != default}


def _parameters(cls: type) -> set[str]:
    """What the constructor of a config class takes."""
    return {f.name for f in fields(cls) if f.init} if is_dataclass(cls) else set()


__all__ = ["MISSING", "VOCABULARY", "tiny_config"]
