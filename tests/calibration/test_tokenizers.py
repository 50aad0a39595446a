"""Which tokenizer or processor belongs to a sparse model; none is made up."""

from types import SimpleNamespace

import pytest
from transformers import (
    BertConfig,
    LlamaConfig,
    PreTrainedTokenizerBase,
    T5Config,
    ViTConfig,
    ViTImageProcessor,
)

from hf_sparse.calibration.tokenizers import find_processor, find_tokenizer, known_processor


def loaded_from(source, tokenizer=None, sparse=False):
    """As much of a sparse model as is asked: pruned here, or loaded sparse."""
    config = SimpleNamespace(tokenizer=tokenizer)
    quantizer = SimpleNamespace(quantization_config=config, pre_quantized=sparse)
    return SimpleNamespace(name_or_path=str(source), hf_quantizer=quantizer)


def test_what_a_checkpoint_s_config_names_is_not_loaded(model_path, tmp_path, tokenizer):
    assert known_processor(loaded_from(tmp_path, str(model_path), sparse=True)) is None
    beside = known_processor(loaded_from(model_path, str(tmp_path), sparse=True))
    assert beside.get_vocab() == tokenizer.get_vocab()


def test_the_config_s_comes_before_the_one_beside_the_files(model_path, tmp_path, tokenizer):
    assert known_processor(loaded_from(tmp_path, tokenizer)) is tokenizer
    found = known_processor(loaded_from(tmp_path, str(model_path)))
    assert isinstance(found, PreTrainedTokenizerBase)
    assert found.get_vocab() == tokenizer.get_vocab()


def test_a_config_s_path_of_another_machine_gives_way_to_the_files(model_path, tokenizer):
    found = known_processor(loaded_from(model_path, "/nowhere/here"))
    assert found.get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("kind", [BertConfig, LlamaConfig, T5Config, ViTConfig])
def test_where_there_are_no_files_there_is_no_tokenizer(tmp_path, kind):
    kind().save_pretrained(tmp_path)
    assert find_tokenizer(tmp_path) is None
    assert known_processor(loaded_from(tmp_path)) is None
    assert known_processor(loaded_from("")) is None


def test_of_a_processor_more_than_the_tokenizer_is_found(tmp_path):
    ViTConfig().save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    assert find_processor(tmp_path).size["height"] == 8
