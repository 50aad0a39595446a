"""Names that have changed: the old ones work, and say what they are called now."""

import json

import pytest
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import SparseConfig
from hf_sparse_cli.options import make_config


def test_an_old_argument_of_a_config_is_taken_with_a_warning():
    with pytest.warns(FutureWarning, match="damp_percent= is called damping= now") as caught:
        config = SparseConfig(damp_percent=0.05)
    assert config == SparseConfig(damping=0.05)
    assert caught[0].filename == __file__
    with pytest.raises(TypeError, match="pass one of them"):
        SparseConfig(damp_percent=0.05, damping=0.05)


def test_a_checkpoint_of_an_older_version_loads_without_a_word(tiny, tmp_path):
    hf_sparse.prune(tiny, SparseConfig(method="magnitude", damping=0.03))
    tiny.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"damping"', '"damp_percent"'))
    assert "damp_percent" in json.loads(path.read_text())["quantization_config"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.quantization_config.damping == 0.03


def test_a_config_file_may_have_an_old_name(tmp_path):
    (tmp_path / "a.yaml").write_text("damp_percent: 0.2\n")
    assert make_config({}, tmp_path / "a.yaml").damping == 0.2


def test_functions_take_their_old_arguments_with_a_warning(tiny, token_ids):
    ids = [list(map(int, row)) for row in token_ids[:2]]
    with pytest.warns(FutureWarning, match="data= is called dataset= now") as caught:
        old = hf_sparse.perplexity(tiny, None, data=ids)
    assert caught[0].filename == __file__
    assert old == hf_sparse.perplexity(tiny, None, ids)


def test_a_function_that_was_called_otherwise_is_found_with_a_warning():
    with pytest.warns(FutureWarning, match=r"hf_sparse.convert_checkpoint is called hf_sparse.con"):
        assert hf_sparse.convert_checkpoint is hf_sparse.convert
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hf_sparse.nothing


@pytest.mark.parametrize("given", [["--data", "none.txt"], ["--data=none.txt"]])
def test_an_old_option_works_and_says_its_new_name(cli, given):
    code, _, said = cli("eval", "./nowhere", *given)
    assert code == 1
    assert "--data is called --dataset now" in said
    assert "there is no folder ./nowhere" in said
