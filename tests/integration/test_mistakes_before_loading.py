"""What can be found out before a model's weights are loaded is found out then."""

import pytest
from transformers import AutoModelForCausalLM

from conftest import save_with_tokenizer
from hf_sparse import CalibrationError, ConfigError, SparseConfig, TargetError

TEXTS = ["Some text that is long enough for a few tokens. " * 20]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_with_tokenizer(tmp_path_factory.mktemp("models") / "dense", num_hidden_layers=1)


@pytest.fixture
def no_weights(monkeypatch):
    """Loading weights ends the test."""
    name = "transformers.modeling_utils.convert_and_load_state_dict_in_model"
    monkeypatch.setattr(name, lambda *args, **kwargs: pytest.fail("weights were loaded"))


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"dataset": "none.txt"}, CalibrationError, "none.txt': there is no such file"),
        ({"dataset": ""}, CalibrationError, "is a folder: pass one file"),
        ({"dataset": [{"words": 1}] * 2}, CalibrationError, "'words'"),
        ({"dataset": ["short"]}, CalibrationError, "fewer than one sequence of 16"),
        ({"dataset": [[1, 2, 5000]]}, CalibrationError, "token id 5000"),
        ({"dataset": TEXTS, "seq_len": 100}, ConfigError, "longer than the 64 positions"),
        ({"dataset": TEXTS, "tokenizer": "./nowhere"}, CalibrationError, "nowhere"),
        ({"dataset": TEXTS, "targets": ["q_prok"]}, TargetError, "near names: .*q_proj"),
        ({"dataset": TEXTS, "modules_to_not_convert": ["x"]}, TargetError, "'x' matches no"),
        ({"dataset": TEXTS, "sparsity": {"up_prok": 0.5}}, TargetError, "near names: .*up_proj"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_a_mistake_is_told_before_weights_are_loaded(dense, arguments, kind, words):
    config = SparseConfig(**{"seq_len": 16, "num_samples": 2, **arguments})
    with pytest.raises(kind, match=words):
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)


def test_data_that_can_be_read_once_are_read_once(dense):
    config = SparseConfig(dataset=iter(TEXTS), seq_len=16, num_samples=2)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    assert model.hf_quantizer.report.data.count == 2


@pytest.mark.parametrize("command", ["prune", "eval"])
def test_a_name_in_a_folder_that_is_here_is_no_hub_id(cli, dense, monkeypatch, command):
    monkeypatch.chdir(dense.parent.parent)
    output = ["--output", "out"] if command == "prune" else ["--speed"]
    code, _, said = cli(command, f"{dense.parent.name}/desne", *output)
    assert code == 1
    assert f"there is no folder {dense.parent.name}/desne" in said
    (dense.parent / "data").mkdir(exist_ok=True)
    more = ["--dataset", f"{dense.parent.name}/none"]
    code, _, said = cli(command, dense, *output, *more)
    assert code == 1
    assert "there is no such file" in said


@pytest.mark.usefixtures("no_weights")
def test_an_estimate_needs_no_output_and_a_run_does(cli, dense, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, printed, _ = cli("prune", dense, "--method", "magnitude", "--dry-run")
    assert code == 0
    assert "GB at the peak" in printed
    assert list(tmp_path.iterdir()) == []
    code, _, said = cli("prune", dense, "--method", "magnitude")
    assert code == 2
    assert "--output" in said
