"""A model on the command line: what it is, before and while it is loaded."""

import json

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel, LlamaConfig, T5Config

from hf_sparse_cli.failures import Failure
from hf_sparse_cli.models import _auto_class, check_dtype, load, quantisation, read_config

SIZES = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20}


@pytest.mark.parametrize(
    ("config", "architecture", "auto"),
    [
        (LlamaConfig, "LlamaForCausalLM", "AutoModelForCausalLM"),
        (BertConfig, "BertForMaskedLM", "AutoModelForMaskedLM"),
        (BertConfig, "BertForSequenceClassification", "AutoModelForSequenceClassification"),
        (BertConfig, "BertModel", "AutoModel"),
        (T5Config, "T5ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        (LlamaConfig, None, "AutoModel"),
    ],
)
def test_a_model_is_loaded_as_the_kind_that_its_config_names(config, architecture, auto):
    given = config(architectures=architecture and [architecture])
    assert _auto_class(given).__name__ == auto


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM])
def test_a_model_without_a_tokenizer_loads(tmp_path, kind):
    kind(BertConfig(num_hidden_layers=1, **SIZES)).save_pretrained(tmp_path)
    model, tokenizer = load(str(tmp_path), None, "bfloat16", None)
    assert type(model) is kind
    assert model.dtype == torch.bfloat16
    assert tokenizer is None


@pytest.mark.parametrize("name", ["int8", "nn", "float99"])
def test_a_dtype_that_is_none_is_named(name):
    check_dtype("auto")
    check_dtype("float16")
    with pytest.raises(Failure, match=f"--dtype {name} is not known: pass auto, float32"):
        check_dtype(name)


@pytest.mark.parametrize("model", ["./x", "/x/y", "~/x", "a/b/c", "a\\b"])
def test_what_can_only_be_a_path_is_not_looked_up_on_the_hub(model):
    with pytest.raises(Failure, match="there is no folder"):
        read_config(model, None)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({}, None),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"quantization_config": 3}, None),
    ],
)
def test_the_method_is_what_the_config_names(tmp_path, config, method):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert quantisation(read_config(str(tmp_path), None)) == method
