"""Tiny random models of the families whose attention is made sparse, and batches for them."""

import torch
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    ViTConfig,
    ViTModel,
)

TOKENS = 75  # no multiple of a block
VOCABULARY = 50
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TEXT = SIZES | {"vocab_size": VOCABULARY, "max_position_embeddings": 128}
SMALL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def make(family: str) -> torch.nn.Module:
    """A model in eval mode, the same one every time."""
    torch.manual_seed(0)
    grouped = TEXT | {"num_key_value_heads": 2, "head_dim": 8} | SMALL
    made = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**grouped)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**grouped)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**grouped, sliding_window=21)),
        "opt": lambda: OPTForCausalLM(
            OPTConfig(
                **TEXT, **SMALL, ffn_dim=32, word_embed_proj_dim=32, do_layer_norm_before=True
            )
        ),
        "bert": lambda: BertModel(BertConfig(**TEXT)),
        "modernbert": lambda: ModernBertModel(
            ModernBertConfig(
                **TEXT, **SMALL, cls_token_id=1, sep_token_id=2, local_attention=22,
                global_attn_every_n_layers=2,
            )
        ),
        "vit": lambda: ViTModel(ViTConfig(**SIZES, image_size=36, patch_size=4)),
    }  # fmt: skip
    model = made[family]().eval()
    with torch.no_grad():  # scores that differ
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name or "query" in name or "key" in name:
                weight.mul_(12)
    return model


def batch(kind: str, family: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs of two samples, and which of their tokens are no padding."""
    torch.manual_seed(1)
    if family == "vit":
        return {"pixel_values": torch.randn(2, 3, 36, 36)}, torch.ones(2, 82, dtype=torch.bool)
    ids = torch.randint(3, VOCABULARY, (2, TOKENS))
    mask = torch.ones_like(ids)
    if kind == "left":
        mask[0, :29] = 0
    if kind == "right":
        mask[1, 46:] = 0
    inputs = {"input_ids": ids}
    if kind == "packed":
        lengths = (5, 37, 2, TOKENS - 44)
        positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
        inputs |= {"position_ids": positions, "use_cache": False}
    elif kind != "plain":
        inputs["attention_mask"] = mask
    return inputs, mask.bool()
