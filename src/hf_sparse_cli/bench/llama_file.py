"""A Llama as a GGUF file, for llama.cpp's `llama-bench` alone: it holds no tokenizer."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("F16", "Q8_0", "Q4_0")
SECONDS = 600  # after which its program is stopped

# By transformers' names of a block's weights, GGUF's.
_BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


class LlamaError(Exception):
    """llama.cpp can't be timed with this model or program; the message says why."""


def write(model: nn.Module, file: Path, kind: str) -> None:
    """Write a dense Llama's weights, matrices as one of `KINDS`, vectors in fp32.

    Raises:
        LlamaError: the model is no Llama, or its shapes don't fit the file type.
        ImportError: the package gguf is missing.
    """
    import gguf

    config: Any = model.config
    if config.model_type != "llama":
        raise LlamaError(f"only a Llama is written for llama.cpp, this is a {config.model_type}")
    heads = config.num_attention_heads
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(
        getattr(config, "head_dim", None) or config.hidden_size // heads
    )
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    number = gguf.GGMLQuantizationType[kind]
    for name, tensor in _tensors(model).items():
        values = tensor.detach().float().numpy()
        if tensor.dim() == 1:
            writer.add_tensor(name, values)
            continue
        try:
            packed = gguf.quants.quantize(values, number)
        except gguf.quants.QuantError as error:
            raise LlamaError(f"{name} of {tuple(tensor.shape)} can't be {kind}: {error}") from None
        writer.add_tensor(name, packed, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: Any) -> dict[str, Tensor]:
    """The weights by GGUF's names."""
    found = {
        "token_embd.weight": model.model.embed_tokens.weight,
        "output_norm.weight": model.model.norm.weight,
        "output.weight": model.lm_head.weight,
    }
    for index, block in enumerate(model.model.layers):
        for own, other in _BLOCK.items():
            found[f"blk.{index}.{other}.weight"] = block.get_submodule(own).weight
    return found


def decode_speed(program: Path, file: Path, tokens: int, rounds: int) -> float:
    """Decoded tokens a second, by `llama-bench`, with torch's number of threads.

    Raises:
        LlamaError: the program fails, or says something else than it is known to.
    """
    threads = torch.get_num_threads()
    settings = {"-m": file, "-p": 0, "-n": tokens, "-r": rounds, "-t": threads, "-o": "json"}
    command = [str(program), *(str(part) for pair in settings.items() for part in pair)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS)
        [found] = [row for row in json.loads(done.stdout) if row["n_gen"] == tokens]
        return float(found["avg_ts"])
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LlamaError(f"{program} doesn't run: {error}") from None
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines()[-1:] or ["nothing"]
        raise LlamaError(f"{program} ends with code {error.returncode}: {said[0]}") from None
    except (ValueError, KeyError, TypeError):
        raise LlamaError(f"{program} printed no table of its own: is it llama-bench?") from None
