"""`SparseConfig`: what it accepts and refuses, and what survives JSON."""

import contextlib
import copy
import inspect
import json
import re
from collections.abc import Sequence
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from argument_table import argument_table

from conftest import ROOT
from hf_sparse import AttentionSettings, ConfigError, DataRecord, SparseConfig, TargetError
from hf_sparse.config.arguments import ARGUMENTS
from hf_sparse.core import module_names
from hf_sparse.core.module_names import matches
from hf_sparse.core.patterns import NM, Unstructured
from hf_sparse.core.statistics import Needs
from hf_sparse.formats import FORMATS
from hf_sparse.solvers import SOLVERS

TEXTS = ["one text", "another"]


@pytest.fixture(autouse=True)
def _unchecked():
    """As users run it: whatever they pass meets the config's own checks, not the tests'."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def through_json(config: SparseConfig) -> SparseConfig:
    return SparseConfig.from_dict(json.loads(json.dumps(config.to_dict())))


def everything_set() -> SparseConfig:
    return SparseConfig(
        sparsity=0.625,
        pattern="unstructured",
        method="wanda",
        dataset="wikitext2",
        tokenizer="gpt2",
        num_samples=7,
        seq_len=99,
        batch_size=3,
        seed=11,
        join_documents=True,
        modules_to_not_convert=["lm_head", r"layers\.0"],
        targets=["q_proj|k_proj"],
        blocks=["layers.[0-9]+"],
        damping=0.03,
        block_size=64,
        refit=7,
        stages=True,
        target="dense",
        metric="fisher",
        allocation="owl",
        low_rank=5,
        bits=4,
        group_size=64,
        sym=False,
        experts=0.25,
        expert_score="frequency",
        expert_budget="global",
        moe_min_tokens=17,
        calibrate_all_experts=True,
        format="bitmask",
        activations="int8",
        attention={"method": "hs_block", "keys": 2048},
    )


def test_defaults_are_those_of_the_documentation():
    assert SparseConfig().to_dict() == {
        "quant_method": "hf_sparse",
        "sparsity": 0.5,
        "pattern": "unstructured",
        "method": "sparsegpt",
        "dataset": None,
        "tokenizer": None,
        "num_samples": 128,
        "seq_len": None,
        "batch_size": 1,
        "seed": 0,
        "join_documents": False,
        "modules_to_not_convert": None,
        "targets": None,
        "blocks": None,
        "damping": 0.01,
        "block_size": 128,
        "refit": 0,
        "stages": False,
        "target": "layer",
        "metric": "inputs",
        "allocation": "uniform",
        "low_rank": 0,
        "bits": None,
        "group_size": 128,
        "sym": True,
        "experts": None,
        "expert_score": "reap",
        "expert_budget": "layer",
        "moe_min_tokens": None,
        "calibrate_all_experts": False,
        "format": "auto",
        "prefer": "auto",
        "activations": None,
        "input_sparsity": None,
        "attention": None,
    }


@pytest.mark.parametrize(
    "config",
    [
        SparseConfig(),
        everything_set(),
        SparseConfig(sparsity=0.1 + 0.2),
        SparseConfig(sparsity={"layers.1": 0.3, "q_proj": 0.0}),
        SparseConfig(pattern="1:3"),
        SparseConfig(pattern="2:4", sparsity={"q_proj": 0.5, "k_proj": 0.0}, format="n:m"),
        SparseConfig(method="keep", format="n:m"),
        SparseConfig(dataset=TEXTS, tokenizer=Path("here")),
        SparseConfig(dataset=DataRecord("c4", "abcdef", 128, 4096)),
    ],
    ids=repr,
)
def test_a_config_comes_back_from_json_unchanged(config):
    back = through_json(config)
    assert back.to_dict() == config.to_dict()
    assert back == config
    assert repr(back) == repr(config)
    assert through_json(back).to_dict() == config.to_dict()


@pytest.mark.parametrize("use_diff", [True, False])
def test_the_text_in_config_json_keeps_the_order_in_which_regexes_are_tried(use_diff):
    # The first regex that matches decides: in another order they say something else.
    config = SparseConfig(sparsity={"q_proj": 0.3, "layers": 0.5}, method="magnitude")
    back = SparseConfig.from_dict(json.loads(config.to_json_string(use_diff=use_diff)))
    assert list(back.sparsity.items()) == [("q_proj", 0.3), ("layers", 0.5)]


def test_the_diff_holds_what_differs_and_always_method_sparsity_and_pattern():
    assert SparseConfig(seed=3).to_diff_dict() == {
        "quant_method": "hf_sparse",
        "method": "sparsegpt",
        "sparsity": 0.5,
        "pattern": "unstructured",
        "seed": 3,
    }
    assert SparseConfig.from_dict(everything_set().to_diff_dict()) == everything_set()


@pytest.mark.parametrize(
    ("dataset", "described"),
    [
        (None, None),
        ("wikitext2", "wikitext2"),
        (Path("texts") / "a.txt", str(Path("texts") / "a.txt")),
        (TEXTS, "list of str"),
        ([torch.ones(3, dtype=torch.int64)], "list of Tensor"),
        ([], "list"),
        ((text for text in TEXTS), "generator"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_data_are_described_and_never_contained(dataset, described):
    value = SparseConfig(dataset=dataset).to_dict()["dataset"]
    if dataset is None or isinstance(dataset, (str, Path)):
        assert value == described
    else:
        assert value == {"source": described, "digest": None, "count": None, "tokens": None}
    assert "one text" not in json.dumps(SparseConfig(dataset=dataset).to_dict())


def test_a_tokenizer_object_is_described_by_its_name(tokenizer):
    assert SparseConfig(tokenizer=tokenizer).to_dict()["tokenizer"] == tokenizer.name_or_path
    assert SparseConfig(tokenizer=object()).to_dict()["tokenizer"] == "object"


def test_configs_are_equal_if_they_say_the_same():
    assert SparseConfig() == SparseConfig(sparsity=0.5)
    assert SparseConfig() != SparseConfig(seed=1)
    assert SparseConfig() != "SparseConfig()"
    with pytest.raises(TypeError, match="unhashable"):
        hash(SparseConfig())


def test_the_repr_can_be_read_back():
    config = SparseConfig(sparsity=0.25, seed=4, targets=["q_proj"])
    assert eval(repr(config), {"SparseConfig": SparseConfig}) == config
    assert "block_size" not in repr(config)


def test_iterating_gives_the_pairs_of_the_dict():
    assert dict(everything_set()) == everything_set().to_dict()


def test_a_deep_copy_shares_data_that_can_not_be_copied():
    data, tokenizer = (text for text in TEXTS), object()
    config = SparseConfig(dataset=data, tokenizer=tokenizer, seed=5)
    other = copy.deepcopy(config)
    assert other.dataset is data
    assert other.tokenizer is tokenizer
    assert other == config
    other.seed = 6
    assert config.seed == 5


def test_replacing_arguments_gives_a_validated_copy():
    config = everything_set()
    other = config.replaced(seed=12)
    assert (other.seed, config.seed) == (12, 11)
    assert other.replaced(seed=11) == config
    with pytest.raises(ConfigError, match="seed=-1"):
        config.replaced(seed=-1)


# --- sparsity and pattern -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "implied"), [("2:4", 0.5), ("1:4", 0.75), ("3:4", 0.25), ("unstructured", 0.5)]
)
def test_a_pattern_implies_its_sparsity(pattern, implied):
    assert SparseConfig(pattern=pattern).sparsity == implied
    assert SparseConfig(pattern=pattern, sparsity=implied).sparsity == implied


def test_layer_patterns_take_the_layer_s_sparsity():
    assert SparseConfig().layer_pattern(0.3) == Unstructured(0.3)
    assert SparseConfig(pattern="2:4").layer_pattern(0.5) == NM(2, 4)


def test_sparsity_zero_is_allowed():
    assert SparseConfig(sparsity=0).sparsity == 0.0


@pytest.mark.parametrize("sparsity", [1, 1.0, -0.1, 50, float("nan"), float("inf"), True])
def test_a_sparsity_outside_its_range_is_refused(sparsity):
    with pytest.raises(ConfigError, match="0 <= s < 1") as caught:
        SparseConfig(sparsity=sparsity)
    assert f"sparsity={sparsity!r}" in str(caught.value)


def test_a_percentage_is_refused_with_the_fraction_that_was_meant():
    with pytest.raises(ConfigError, match=r"for 50 % pass 0\.5"):
        SparseConfig(sparsity=50)


def test_a_bad_sparsity_of_one_regex_is_refused_with_the_regex():
    with pytest.raises(ConfigError, match=r"sparsity\['mlp'\]=1\.5"):
        SparseConfig(sparsity={"q_proj": 0.5, "mlp": 1.5})


def test_an_empty_mapping_is_refused():
    with pytest.raises(ConfigError, match="prunes nothing"):
        SparseConfig(sparsity={})


@pytest.mark.parametrize("sparsity", [0.6, 0.0, {"q_proj": 0.6}])
def test_a_sparsity_that_contradicts_the_pattern_is_refused(sparsity):
    with pytest.raises(ConfigError, match=r"contradicts pattern='2:4'.*1/2"):
        SparseConfig(sparsity=sparsity, pattern="2:4")


@pytest.mark.parametrize("pattern", ["2-4", "4:2", "0:4", "4:4", ""])
def test_a_bad_pattern_is_refused(pattern):
    with pytest.raises(ConfigError, match="pattern="):
        SparseConfig(pattern=pattern)


def test_keep_takes_neither_sparsity_nor_pattern():
    assert SparseConfig(method="keep").sparsity is None
    for arguments in ({"sparsity": 0.5}, {"pattern": "2:4"}):
        with pytest.raises(ConfigError, match="keeps the zeros that are there"):
            SparseConfig(method="keep", **arguments)


# --- the other arguments --------------------------------------------------------------------


@pytest.mark.parametrize("method", SOLVERS)
def test_every_registered_method_is_accepted(method):
    assert SparseConfig(method=method).method == method


def test_an_unknown_method_is_refused_with_those_that_exist():
    with pytest.raises(ConfigError, match="method='prune_all'") as caught:
        SparseConfig(method="prune_all")
    assert all(name in str(caught.value) for name in SOLVERS)


def test_an_unknown_format_is_refused_with_those_that_exist():
    with pytest.raises(ConfigError, match="format='csr'") as caught:
        SparseConfig(format="csr")
    assert all(name in str(caught.value) for name in ("auto", *FORMATS))


def test_the_n_of_m_format_is_refused_for_a_pattern_that_it_can_not_store():
    with pytest.raises(ConfigError, match="n:m patterns only"):
        SparseConfig(format="n:m")
    assert SparseConfig(format="n:m", pattern="2:4").format == "n:m"


def test_groups_too_wide_for_the_n_of_m_format_are_refused_before_anything_is_pruned():
    # The layout takes m <= 32; found out while packing, it would leave a model half pruned.
    with pytest.raises(ConfigError, match=r"pattern='16:64'|m = 64"):
        SparseConfig(format="n:m", pattern="16:64")
    assert SparseConfig(format="n:m", pattern="16:32").pattern == "16:32"
    assert SparseConfig(format="bitmask", pattern="16:64").pattern == "16:64"


@pytest.mark.parametrize(
    ("name", "value"), [("allocation", "owls"), ("target", "model"), ("metric", "output")]
)
def test_an_unknown_choice_is_refused_with_what_there_is(name, value):
    with pytest.raises(ConfigError, match=f"{name}='{value}' does not exist: pass '"):
        SparseConfig(**{name: value, "refit": 5})


@pytest.mark.parametrize("rank", [-1, 2.0, True, "8", None])
def test_a_low_rank_that_is_no_count_is_refused(rank):
    with pytest.raises(ConfigError, match=r"low_rank=.* must be an integer of at least 0"):
        SparseConfig(low_rank=rank)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_low_rank_part_needs_the_hessian_and_with_it_data(method):
    config = SparseConfig(method=method, low_rank=4)
    assert config.needs is Needs.HESSIAN
    with pytest.raises(ConfigError, match=r"=.* needs calibration data"):
        config.check_data()
    config.replaced(dataset=TEXTS).check_data()


def test_a_low_rank_part_is_refused_where_nothing_is_pruned_or_stored_sparse():
    with pytest.raises(ConfigError, match=r"'keep' changes no weight: it takes .*low_rank"):
        SparseConfig(method="keep", low_rank=4)
    with pytest.raises(ConfigError, match="format='dense' holds no low-rank part"):
        SparseConfig(format="dense", low_rank=4)
    assert SparseConfig(format="dense", low_rank=4, bits=4).low_rank == 4


def test_a_recipe_stands_for_settings_that_can_be_changed_one_by_one():
    plain = SparseConfig(method="alps", refit=20, target="dense", metric="fisher")
    best = SparseConfig(method="best")
    for name in ("refit", "target", "metric", "stages"):
        assert getattr(best, name) == getattr(plain, name)
    assert (best.solver, best.allocation) == ("alps", "fisher")
    changed = SparseConfig(method="best", refit=3, metric="inputs", allocation="uniform")
    assert (changed.refit, changed.metric, changed.target) == (3, "inputs", "dense")
    assert through_json(changed) == changed
    assert "target" not in repr(changed)
    assert "refit=3" in repr(changed)


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude", "admm", "alps"])
def test_plain_methods_add_nothing_to_their_papers(method):
    config = SparseConfig(method=method)
    assert (config.refit, config.stages, config.target) == (0, False, "layer")
    assert (config.metric, config.allocation) == ("inputs", "uniform")


def test_a_recipe_s_allocation_gives_way_where_the_pattern_leaves_no_choice():
    assert SparseConfig(method="best", pattern="2:4").allocation == "uniform"
    assert SparseConfig(method="best", sparsity={"mlp": 0.5}).allocation == "uniform"
    with pytest.raises(ConfigError, match=r"pattern='2:4' fixes every layer's sparsity"):
        SparseConfig(allocation="fisher", pattern="2:4")
    with pytest.raises(ConfigError, match="sparsity gives each layer its own"):
        SparseConfig(allocation="owl", sparsity={"mlp": 0.5})


def test_an_explicit_allocation_round_trips_in_its_order():
    config = SparseConfig(allocation={"q_proj": 0.7, "mlp": 0.4})
    assert list(through_json(config).allocation.items()) == [("q_proj", 0.7), ("mlp", 0.4)]


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match=r"metric='fisher'.*refit is 0"):
        SparseConfig(metric="fisher")
    with pytest.raises(ConfigError, match="changes no weight"):
        SparseConfig(method="keep", refit=3)


@pytest.mark.parametrize(
    "extra", [{"refit": 3}, {"stages": True}, {"target": "dense"}, {"allocation": "owl"}]
)
def test_settings_that_need_data_say_so(extra):
    (name,) = extra
    with pytest.raises(ConfigError, match=f"{name}=.* needs calibration data"):
        SparseConfig(method="magnitude", **extra).check_data()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_samples", 0),
        ("num_samples", True),
        ("seq_len", 0),
        ("seq_len", -5),
        ("batch_size", 0),
        ("seed", -1),
        ("block_size", 0),
    ],
)
def test_counts_below_their_least_value_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name}={value!r} must be an integer of at least"):
        SparseConfig(**{name: value})


@pytest.mark.parametrize("value", [0, 0.0, -0.01, float("inf"), float("nan"), True])
def test_a_damping_that_is_no_positive_number_is_refused(value):
    with pytest.raises(ConfigError, match=r"damping=.* positive number"):
        SparseConfig(damping=value)


@pytest.mark.parametrize("name", ["targets", "modules_to_not_convert", "blocks"])
def test_lists_of_regexes_are_checked(name):
    assert getattr(SparseConfig(**{name: ("q_proj",)}), name) == ["q_proj"]
    assert getattr(SparseConfig(**{name: []}), name) == []
    with pytest.raises(ConfigError, match=f"{name}.*list of regexes"):
        SparseConfig(**{name: "q_proj"})
    with pytest.raises(ConfigError, match=rf"{name} holds '\(', no valid regex"):
        SparseConfig(**{name: ["q_proj", "("]})


def test_a_mapping_s_regexes_are_checked():
    with pytest.raises(ConfigError, match=r"'\[', no valid regex"):
        SparseConfig(sparsity={"[": 0.5})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sparsity", "0.5"),
        ("sparsity", [0.5]),
        ("sparsity", {"q_proj": "0.5"}),
        ("sparsity", {1: 0.5}),
        ("pattern", None),
        ("pattern", 4),
        ("method", None),
        ("method", ["wanda"]),
        ("num_samples", 12.0),
        ("num_samples", "12"),
        ("seq_len", 1.5),
        ("batch_size", None),
        ("seed", "0"),
        ("targets", [3]),
        ("targets", 3),
        ("modules_to_not_convert", [None]),
        ("damping", "0.01"),
        ("damping", None),
        ("block_size", 128.0),
        ("allocation", 3),
        ("allocation", {"q_proj": "0.5"}),
        ("refit", True),
        ("refit", -1),
        ("stages", 1),
        ("target", 0),
        ("bits", 5),
        ("bits", "4"),
        ("group_size", 100),
        ("group_size", 0),
        ("group_size", None),
        ("sym", 1),
        ("format", None),
        ("format", ["bitmask"]),
    ],
    ids=str,
)
def test_a_value_of_a_wrong_type_is_refused_with_the_argument_s_name(name, value):
    with pytest.raises(ConfigError) as caught:
        SparseConfig(**{name: value})
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "held"),
    [
        ("sparsity", np.float32(0.5), 0.5),
        ("sparsity", {"mlp": np.float32(0.25)}, {"mlp": 0.25}),
        ("damping", np.float32(0.5), 0.5),
        ("experts", np.float32(0.5), 0.5),
        ("num_samples", np.int64(8), 8),
        ("seed", np.uint8(3), 3),
        ("bits", np.int64(4), 4),
        ("group_size", np.int32(64), 64),
        ("attention", {"keys": np.int64(64)}, AttentionSettings(keys=64)),
    ],
    ids=str,
)
def test_a_number_of_numpy_is_a_number(name, value, held):
    config = SparseConfig(**{name: value})
    assert getattr(config, name) == held
    assert type(getattr(config, name)) is type(held)
    assert SparseConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("name", ["sym", "stages", "num_samples", "sparsity", "bits"])
def test_a_truth_value_of_numpy_is_no_number(name):
    with pytest.raises(ConfigError, match=f"{name}="):
        SparseConfig(**{name: np.bool_(True)})


def test_the_caller_s_containers_are_not_shared():
    sparsity, targets = {"q_proj": 0.5}, ["q_proj"]
    config = SparseConfig(sparsity=sparsity, targets=targets)
    sparsity["k_proj"] = 0.1
    targets.append("k_proj")
    assert config.sparsity == {"q_proj": 0.5}
    assert config.targets == ["q_proj"]


# --- data -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name, cls in SOLVERS.items() if cls.needs > 0])
def test_a_method_that_needs_data_says_so_before_anything_is_loaded(method):
    with pytest.raises(ConfigError, match=f"method='{method}' needs calibration data"):
        SparseConfig(method=method).check_data()
    SparseConfig(method=method, dataset="wikitext2").check_data()


@pytest.mark.parametrize("method", [name for name, cls in SOLVERS.items() if cls.needs == 0])
def test_a_method_that_needs_no_data_runs_without(method):
    SparseConfig(method=method).check_data()


@pytest.mark.parametrize(
    "config",
    [
        SparseConfig(dataset=DataRecord("c4", "abcdef", 128, 4096)),
        SparseConfig(dataset=TEXTS),
    ],
    ids=["used", "not used"],
)
def test_a_config_that_only_describes_its_data_asks_for_them(config):
    with pytest.raises(ConfigError, match="pass dataset="):
        through_json(config).check_data()


# --- from_dict ------------------------------------------------------------------------------


def test_an_unknown_key_is_refused_by_name():
    with pytest.raises(ConfigError, match="'sparsity_config'") as caught:
        SparseConfig.from_dict({"quant_method": "hf_sparse", "sparsity_config": {}})
    assert "update it" in str(caught.value)


def test_a_bad_value_in_a_dict_is_refused():
    with pytest.raises(ConfigError, match="seed=-1"):
        SparseConfig.from_dict({"seed": -1})


def test_arguments_beside_the_dict_win_and_others_are_handed_back():
    config, unused = SparseConfig.from_dict(
        {"seed": 1}, return_unused_kwargs=True, seed=2, device_map="auto"
    )
    assert config == SparseConfig(seed=2)
    assert unused == {"device_map": "auto"}


def test_arguments_beside_the_dict_are_validated_too():
    with pytest.raises(ConfigError, match="seed=-2"):
        SparseConfig.from_dict({"seed": 1}, seed=-2)


def test_the_dict_passed_is_left_as_it_was():
    given = everything_set().to_dict()
    before = copy.deepcopy(given)
    SparseConfig.from_dict(given, seed=3)
    assert given == before


# --- what a stranger's config may hold ------------------------------------------------------

DEEP = []
for _ in range(5000):
    DEEP = [DEEP]
HUGE = 10**5000


@pytest.mark.parametrize(
    "arguments",
    [
        *({name: value} for name in ARGUMENTS for value in (HUGE, -HUGE, DEEP, float("nan"))),
        *(
            {name: ones(2)}
            for name in ARGUMENTS
            for ones in (torch.ones, np.ones)
            if name not in ("dataset", "tokenizer")
        ),
        {"targets": ["a{99999999999999}"]},
        {"targets": ["(" * 3000 + ")" * 3000]},
        {"blocks": ["x" * 1001]},
        {"targets": ["((a{99}){99}){99}"]},
        {"sparsity": [[["a"], 0.5]]},
        {"sparsity": [["a", HUGE]]},
        {"sparsity": {3: 0.5}},
        {"sparsity": {"x" * 10**6: 0.5}},
        {"allocation": [[{}, 0.5]]},
        {"allocation": {"(": 0.5}},
        {"pattern": "1:" + "9" * 5000},
        {"pattern": "1:999999999999"},
        {"bits": 4.0},
        {"sym": 1},
        {"seed": 2**63},
        {"dataset": {"source": 3, "digest": None, "count": None, "tokens": None}},
        {"dataset": {"source": "c4", "digest": [], "count": HUGE, "tokens": None}},
    ],
    ids=lambda arguments: f"{next(iter(arguments))}",
)
def test_a_value_that_cannot_be_is_one_error_of_one_line(arguments):
    if arguments.keys() <= {"dataset", "tokenizer"} and not isinstance(
        arguments.get("dataset"), dict
    ):
        assert SparseConfig(**arguments) is not None  # any object may be iterable, or a tokenizer
        return
    with pytest.raises(ConfigError) as caught:
        SparseConfig(**arguments)
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


def test_a_long_regex_is_refused_without_being_read():
    with pytest.raises(ConfigError, match="a regex of 1000000 letters: expected 1000 at most"):
        SparseConfig(targets=["x" * 10**6])


@pytest.mark.parametrize(
    "regex", ["(a+)+$", "(a|aa)+$", "(a*)*b", "(.*a){25}$", "(" * 400 + ")" * 400]
)
def test_a_regex_that_would_take_for_ever_is_stopped(regex):
    SparseConfig(targets=[regex])
    with contextlib.suppress(TargetError):
        assert not matches(regex, "a" * 40 + "!")


def test_such_a_regex_is_an_error_that_shows_it():
    with pytest.raises(TargetError, match=r"'\(a\|aa\)\+\$' takes more than 1 s"):
        matches("(a|aa)+$", "a" * 60 + "!")


def test_a_regex_that_takes_long_for_each_of_many_names_is_stopped_too(monkeypatch):
    monkeypatch.setattr(module_names, "SECONDS_IN_ALL", 0.1)
    regex = "(a|aa)+$"
    names = [f"{'a' * 26}{number}!" for number in range(1000)]
    with pytest.raises(TargetError, match=r"or 0\.1 s for all names"):
        any(matches(regex, name) for name in names)
    assert matches(regex, "aaa")  # one that is quick is still told


# --- names, and what tools see --------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "near"),
    [("sparcity", "sparsity"), ("num_sample", "num_samples"), ("blocksize", "block_size")],
)
def test_a_misspelt_argument_is_answered_with_the_near_one(name, near):
    words = rf"SparseConfig has no '{name}' \(did you mean '{near}'\?\); it knows sparsity, "
    with pytest.raises(ConfigError, match=words):
        SparseConfig(**{name: 1})
    with pytest.raises(ConfigError, match=words):
        SparseConfig.from_dict({name: 1})


def test_a_misspelt_method_or_format_is_answered_with_the_near_one():
    with pytest.raises(ConfigError, match=r"method='spargegpt' .* did you mean 'sparsegpt'\?"):
        SparseConfig(method="spargegpt")
    with pytest.raises(ConfigError, match=r"format='bitmsk' .* did you mean 'bitmask'\?"):
        SparseConfig(format="bitmsk")


def test_the_signature_has_every_argument_with_its_default_and_types():
    parameters = inspect.signature(SparseConfig).parameters
    assert list(parameters) == list(ARGUMENTS)
    assert {name: p.default for name, p in parameters.items()} == {
        name: argument.default for name, argument in ARGUMENTS.items()
    }
    assert parameters["refit"].annotation == int | None
    assert parameters["seed"].annotation is int
    assert SparseConfig.__init__.__annotations__["targets"] == Sequence[str] | None


def test_help_describes_every_argument():
    described = re.findall(r"^ +(\w+): \S", SparseConfig.__doc__, re.M)
    assert described == [*ARGUMENTS, "ConfigError"]


def test_what_is_assigned_later_is_checked_too():
    config = SparseConfig()
    with pytest.raises(ConfigError, match="seed=-1"):
        config.seed = -1


def test_the_table_in_the_docs_is_that_of_the_arguments():
    assert argument_table() in (ROOT / "docs" / "arguments.md").read_text(encoding="utf-8")
