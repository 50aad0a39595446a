"""The options are the config's arguments: no more, no less, in the config's own words."""

import inspect
import json

import pytest

from hf_sparse import ConfigError, SparseConfig
from hf_sparse_cli import options
from hf_sparse_cli.failures import Failure
from hf_sparse_cli.options import Argument, config_arguments, config_parameters, make_config


def test_every_argument_has_an_option_and_every_option_an_argument():
    arguments = list(inspect.signature(SparseConfig).parameters)
    assert list(config_arguments()) == arguments
    assert [parameter.name for parameter in config_parameters()] == arguments


def test_annotations_are_those_of_the_class():
    for name, parameter in inspect.signature(SparseConfig).parameters.items():
        parts = [part.strip() for part in str(parameter.annotation).split(" | ")]
        assert list(config_arguments()[name].kinds) == [part for part in parts if part != "None"]


def test_every_option_has_the_docstring_s_text():
    doc = " ".join((SparseConfig.__doc__ or "").split())
    for argument in config_arguments().values():
        assert len(argument.text) > 10
        assert f"{argument.name}: {argument.text}" in doc


def config_source(tmp_path, monkeypatch, signature, doc=""):
    """Pretend that SparseConfig is another class."""
    (tmp_path / "__init__.py").touch()
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "sparse_config.py").write_text(
        f'class SparseConfig:\n    """A config.\n\n    Args:\n{doc}\n    """\n\n'
        f"    def __init__(self, {signature}) -> None: ...\n"
    )

    class Spec:
        origin = str(tmp_path / "__init__.py")

    monkeypatch.setattr(options, "find_spec", lambda name: Spec)
    config_arguments.cache_clear()


@pytest.fixture(autouse=True)
def _fresh():
    yield
    config_arguments.cache_clear()


def test_a_new_argument_has_an_option_at_once(tmp_path, monkeypatch):
    signature = "bits: int | None = None, sym: bool = SYMMETRIC, *, stages: list[Any] | str = ()"
    doc = "        bits: of a value,\n            2 to 8.\n        sym: around 0?"
    config_source(tmp_path, monkeypatch, signature, doc)
    assert config_arguments() == {
        "bits": Argument("bits", ("int",), "of a value, 2 to 8."),
        "sym": Argument("sym", ("bool",), "around 0?"),
        "stages": Argument("stages", ("list[Any]", "str"), ""),
    }
    assert [parameter.name for parameter in config_parameters()] == ["bits", "sym", "stages"]


@pytest.mark.parametrize(
    ("kinds", "given", "value"),
    [
        (("float", "Mapping[str, float]"), "0.5", 0.5),
        (("float", "Mapping[str, float]"), '{"mlp": 0.6}', {"mlp": 0.6}),
        (("float", "Sequence[Any]"), '[["mlp", 0.6], ["q", 0.5]]', [["mlp", 0.6], ["q", 0.5]]),
        (("str", "Mapping[str, float]"), "owl", "owl"),
        (("Any",), "123", "123"),
        (("str",), "2:4", "2:4"),
        (("Sequence[str]",), ["a", "b"], ["a", "b"]),
    ],
)
def test_a_value_is_json_where_the_annotation_allows_more_than_one_type(kinds, given, value):
    assert Argument("x", kinds, "").value(given) == value


def test_options_win_over_the_file(tmp_path):
    file = tmp_path / "sparse.yaml"
    file.write_text("method: wanda\nsparsity: {q_proj: 0.7}\ndataset: text.txt\nseed: 3\n")
    assert make_config({"sparsity": "0.25", "seed": 4}, file) == SparseConfig(
        method="wanda", sparsity=0.25, dataset="text.txt", seed=4
    )


def test_what_a_config_writes_is_read_again(tmp_path):
    config = SparseConfig(sparsity={"b": 0.5, "a": 0.25}, dataset="x.txt", targets=["mlp"])
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.to_dict()))
    assert make_config({}, file) == config


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (
            "a.yaml",
            "sparsty: 0.5",
            "a.yaml: SparseConfig has no 'sparsty'; did you mean 'sparsity'",
        ),
        ("a.yaml", "- 1", "holds a list: expected `name: value`"),
        ("a.yaml", "a: [", "is no YAML"),
        ("a.json", "{", "is no JSON"),
        ("a.yaml", None, "can't be read"),
    ],
)
def test_a_file_that_can_not_be_used_is_named(tmp_path, name, text, words):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(Failure, match=words):
        make_config({}, tmp_path / name)


def test_a_wrong_value_is_the_config_s_own_error():
    with pytest.raises(ConfigError, match="sparsity='half' must be the fraction"):
        make_config({"sparsity": "half"}, None)
