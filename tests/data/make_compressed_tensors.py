"""Makes the checkpoints beside this file, with the library that wrote such files.

    python3 -m venv old && . old/bin/activate
    pip install torch==2.13.0 transformers==4.57.6 psutil accelerate compressed-tensors==VERSION
    python make_compressed_tensors.py

VERSION is 0.6.0, 0.8.1, 0.9.4 or 0.14.0.1; each has folders of its own. A folder holds the
checkpoint as the library saved it and, but for the quantised one, in dense.safetensors the weights
that were put in.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors import ModelCompressor
from compressed_tensors.config import BitmaskConfig
from safetensors.torch import save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.pytorch_utils import Conv1D

HERE = Path(__file__).parent
VERSION = version("compressed-tensors")


def make_llama(dtype, hidden, inner, heads):
    """A random one-block Llama whose linear layers have sides that are no multiples of 8."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=23,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        attention_bias=True,
    )
    model = LlamaForCausalLM(config).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            torch.nn.init.normal_(parameter.data)
    return model


def make_gpt2():
    """A random one-block GPT-2: its layers keep their weights as (in, out), its head is tied."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=11, n_positions=8, n_embd=12, n_layer=1, n_head=2, n_inner=13)
    return GPT2LMHeadModel(config).to(torch.float16)


def make_mixtral(dtype):
    """A random one-block Mixtral, whose experts that version of transformers has as modules."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=23, hidden_size=12, intermediate_size=14, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=3,
        max_position_embeddings=32,
    )  # fmt: skip
    return MixtralForCausalLM(config).to(dtype)


@torch.no_grad()
def prune(model, pattern):
    """Zeros in every linear layer of the block: random ones, or 2 of 4 in memory order.

    Not in routers, nor in the last of a mixture's experts.
    """
    for name, layer in model.named_modules():
        dense = name == "lm_head" or name.endswith(".gate") or ".experts.2." in name
        if isinstance(layer, (torch.nn.Linear, Conv1D)) and not dense:
            scores = torch.rand(layer.weight.shape)
            if pattern == "2:4":
                kept = scores.view(-1, 4).topk(2, dim=1).indices
                mask = torch.zeros(scores.numel() // 4, 4).scatter_(1, kept, 1.0).view_as(scores)
            else:
                mask = (scores > 0.7).float()
                mask[1] = 0  # a row without a value
            layer.weight.mul_(mask.to(layer.weight.dtype))


def save(name, model, sparsity, quantisation=None, **settings):
    """Write a folder the way the library's own save wrapper does."""
    folder = HERE / f"{name}-{VERSION}"
    dense = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    given = (sparsity,) if quantisation is None else (sparsity, quantisation)
    compressor = ModelCompressor.from_pretrained_model(model, *given)
    state = compressor.compress(model)
    model.save_pretrained(folder, state_dict=state, **settings)
    compressor.update_config(folder)
    if quantisation is None:
        save_file(dense, folder / "dense.safetensors")


def quantise(model):
    """Give the linear layers 8-bit weights, as the library does after calibration."""
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=8))
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data.fill_(0.01)
            module.quantization_status = "frozen"


def main():
    unstructured = {"sparsity_structure": "unstructured", "global_sparsity": 0.7}
    odd = {"hidden": 12, "inner": 13, "heads": 3}
    if VERSION in ("0.6.0", "0.8.1"):
        model = make_llama(torch.float32 if VERSION == "0.8.1" else torch.float16, **odd)
        prune(model, "unstructured")
        bitmask = BitmaskConfig(format="sparse-bitmask", **unstructured)
        save("bitmask", model, bitmask)
        if VERSION == "0.8.1":
            model = make_gpt2()
            prune(model, "unstructured")
            save("gpt2-bitmask", model, bitmask)
            model = make_mixtral(torch.float16)
            prune(model, "unstructured")
            save("mixtral-bitmask", model, bitmask)
        return
    from compressed_tensors.config import Sparse24BitMaskConfig

    linear = {"targets": ["Linear"], "ignore": ["lm_head"]}
    bitmask = BitmaskConfig(format="sparse-bitmask", **unstructured, **linear)
    sparse24 = Sparse24BitMaskConfig(
        format="sparse-24-bitmask", sparsity_structure="2:4", global_sparsity=0.5, **linear
    )
    newest = VERSION == "0.14.0.1"
    dtype = torch.bfloat16 if newest else torch.float16
    model = make_llama(dtype, hidden=12, inner=14, heads=2)
    prune(model, "2:4")
    save("24", model, sparse24)
    if newest:
        other = make_llama(dtype, **odd)
        prune(other, "unstructured")
        save("bitmask", other, bitmask, max_shard_size="1KB")
        mixture = make_mixtral(dtype)
        prune(mixture, "2:4")
        sparse24.ignore += ["re:.*gate$", "re:.*experts.2.*"]
        save("mixtral-24", mixture, sparse24)
        sparse24.ignore = linear["ignore"]
        quantise(model)
        save("quantised-24", model, sparse24, "int-quantized")


if __name__ == "__main__":
    sys.exit(main())
