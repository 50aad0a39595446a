"""The options are the config's arguments: no more, no less, in the config's own words."""

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from hf_sparse import ConfigError, SparseConfig
from hf_sparse.config.argument import Argument
from hf_sparse_cli.failures import Failure
from hf_sparse_cli.options import config_parameters, make_config, option_value, parameter
from hf_sparse_cli.plain import ARGUMENTS


def test_every_argument_has_an_option_and_every_option_an_argument():
    arguments = list(inspect.signature(SparseConfig).parameters)
    assert [parameter.name for parameter in config_parameters()] == arguments


def test_every_option_says_what_it_does_and_its_default_as_one_would_type_them():
    doc = " ".join((SparseConfig.__doc__ or "").split())
    for made in config_parameters():
        text = made.annotation.__metadata__[0].help.removeprefix("May be repeated. ")
        said, _, default = text.removesuffix("]").partition("  [default: ")
        assert said
        assert default
        own = ARGUMENTS[made.name]
        assert said == own.shell_help
        assert f"{made.name}: {own.help} Default {own.default_text}." in doc
        assert not {"True", "False", "datasets.Dataset"} & {*text.split(), *text.split("`")}


def argument(name, default, *kinds):
    made = Argument(default, "Help.", "group")
    made.name, made.kinds = name, kinds
    return made


@pytest.mark.parametrize(
    ("made", "option", "kind"),
    [
        (argument("some_bits", None, int), "--some-bits", int),
        (argument("sym", True, bool), "--sym/--no-sym", bool),
        (argument("data", None, Any), "--data", str),
        (argument("targets", None, Sequence[str]), "--targets", list[str]),
        (argument("sparsity", None, float, Mapping[str, float]), "--sparsity", str),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_option_is_made_of_an_argument_s_name_and_types(made, option, kind):
    annotation = parameter(made).annotation
    assert annotation.__origin__ == kind | None
    assert annotation.__metadata__[0].default == option


@pytest.mark.parametrize(
    ("kinds", "given", "value"),
    [
        ((float, Mapping[str, float]), "0.5", 0.5),
        ((float, Mapping[str, float]), '{"mlp": 0.6}', {"mlp": 0.6}),
        ((float, Sequence[Any]), '[["mlp", 0.6], ["q", 0.5]]', [["mlp", 0.6], ["q", 0.5]]),
        ((str, Mapping[str, float]), "owl", "owl"),
        ((str, float), "[" * 100_000, "[" * 100_000),
        ((str, float), "1" * 5000, "1" * 5000),
        ((Any,), "123", "123"),
        ((str,), "2:4", "2:4"),
        ((Sequence[str],), ["a", "b"], ["a", "b"]),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_value_is_json_where_more_than_one_type_is_allowed(kinds, given, value):
    assert option_value(argument("x", None, *kinds), given) == value


def test_what_the_command_line_reads_is_what_the_package_has():
    from hf_sparse.config.arguments import ARGUMENTS as OWN

    for name, shared in ARGUMENTS.items():
        same = ("name", "default", "help", "group", "otherwise")
        assert all(getattr(shared, key) == getattr(OWN[name], key) for key in same)
        # Classes of the package are there twice, once without torch.
        kinds = [str(kind).replace("hf_sparse_cli.plain.", "hf_sparse.") for kind in shared.kinds]
        assert kinds == [str(kind) for kind in OWN[name].kinds]


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
            r"a.yaml: SparseConfig has no 'sparsty' \(did you mean 'sparsity'\?\)",
        ),
        ("a.yaml", "- 1", "holds a list: expected `name: value`"),
        ("a.yaml", "a: [", "is no YAML"),
        ("a.yaml", "a: " + "[" * 5000, "is no YAML"),
        ("a.json", "{", "a.json is not JSON"),
        ("a.json", "[" * 100_000, "a.json is not JSON .* nested too deep"),
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
