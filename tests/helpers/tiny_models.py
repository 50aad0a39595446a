"""Random models that are pruned in a blink, always the same ones."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = SIZES | TOKENS | {"num_key_value_heads": 2}
MIXTURE = DECODER | {"head_dim": 6, "num_experts_per_tok": 2}
GPT2 = TOKENS | {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}
T5 = {
    "vocab_size": 61,
    "d_model": 24,
    "d_kv": 6,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}


def build(model: Callable[[Any], PreTrainedModel], config: Any) -> Any:
    """A model of seed 0 in eval mode."""
    torch.manual_seed(0)
    return model(config).eval()


def tiny_llama(**changes) -> LlamaForCausalLM:
    """Two blocks; head not tied."""
    return build(LlamaForCausalLM, LlamaConfig(**(DECODER | changes)))


def drawn(model: PreTrainedModel, std: float = 0.3) -> Any:
    """With weights so large that a mixture's routers decide clearly; in eval mode."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def tiny_mixtral(**changes) -> MixtralForCausalLM:
    """Two blocks of four experts; the gates of the two chosen ones add up to 1."""
    config = MixtralConfig(**MIXTURE | {"num_local_experts": 4} | changes)
    return drawn(MixtralForCausalLM(config))


def tiny_bert(cls: type[PreTrainedModel], **changes) -> PreTrainedModel:
    """Two blocks of an encoder, as one of BERT's classes."""
    return build(cls, BertConfig(**(SIZES | changes)))


def tiny_gpt2(**changes) -> GPT2LMHeadModel:
    """Two blocks whose layers are transformers' Conv1D, with biases."""
    return build(GPT2LMHeadModel, GPT2Config(**(GPT2 | changes)))


def tiny_t5(**changes) -> T5ForConditionalGeneration:
    """Two blocks of an encoder and two of a decoder."""
    return build(T5ForConditionalGeneration, T5Config(**(T5 | changes)))
