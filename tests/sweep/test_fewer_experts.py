"""Families of mixtures with half of their experts, loaded by a process that knows no hf_sparse.

Tiny random models, as in `test_families`.
"""

import fresh
import pytest
import torch
from check import KINDS, build, outputs, types_of
from inputs import find_inputs

import hf_sparse
from hf_sparse import ConfigError, SparseConfig

SEQ2SEQ = [("sequence to sequence", "switch_transformers")]  # experts that are modules
FIRST = [("causal LM", name) for name in ("mixtral", "deepseek_v3", "gpt_oss")] + SEQ2SEQ
OTHERS = ["qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "granitemoe", "phimoe", "jamba"]
OTHERS = [("causal LM", name) for name in OTHERS]
# Experts that are neither fused as transformers' kernels take them nor in a list, or tied; a router
# that looks experts up by the token.
REFUSED = {
    "dbrx", "deepseek_v4", "diffusion_gemma", "hunyuan_v1_moe", "jetmoe", "llama4", "llama4_text",
    "longcat_flash",
}  # fmt: skip
ALL = [
    (kind, name)
    for kind in KINDS
    for name in types_of(kind)
    if (kind, name) not in {*FIRST, *OTHERS}
]

PLAIN = """
import sys, torch, transformers
for line in open(sys.argv[1]):
    folder, name = line.split()
    model = getattr(transformers, name).from_pretrained(folder)
    inputs, expected = torch.load(folder + "/run.pt")
    torch.manual_seed(0)
    with torch.no_grad():
        print(folder, torch.equal(model(**inputs)[0], expected))
assert "hf_sparse" not in sys.modules
"""


def halve(kind, name, folder):
    """Prune, save, and note what to run and what comes of it; the class's name."""
    model = build(kind, name)
    make = find_inputs(model)
    batches = [make(seed) for seed in range(4)]
    report = hf_sparse.prune(model, SparseConfig(experts=0.5, dataset=batches))
    assert report.experts
    for mixture in report.experts:
        assert len(mixture.removed) == len(mixture.scores) // 2
    model.save_pretrained(folder)
    torch.save((batches[0], outputs(model, batches[0])[0]), folder / "run.pt")
    return type(model).__name__


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("families", [FIRST, pytest.param(OTHERS, marks=pytest.mark.slow)])
def test_families_with_half_their_experts_load_in_plain_transformers(families, tmp_path):
    """In one process for all, which is checked not to import the package."""
    folders = {name: tmp_path / name for _, name in families}
    lines = [f"{folders[name]} {halve(kind, name, folders[name])}\n" for kind, name in families]
    (tmp_path / "list").write_text("".join(lines))
    ended = fresh.run(PLAIN, tmp_path / "list")
    assert ended.returncode == 0, ended.stderr
    same = dict(line.split() for line in ended.stdout.splitlines())
    assert same == {str(folder): "True" for folder in folders.values()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "name"), ALL)
def test_every_other_type_with_experts_loads_or_is_refused(kind, name, tmp_path):
    try:
        model = build(kind, name)
        make = find_inputs(model)
        batches = [make(seed) for seed in range(4)]
        outputs(model, batches[0])
    except Exception as error:
        pytest.skip(f"not built: {error}")
    if not any("expert" in module for module, _ in model.named_modules()):
        pytest.skip("it has no experts")
    if name in REFUSED:
        with pytest.raises(ConfigError, match=r"leave experts out|removes none"):
            hf_sparse.prune(model, SparseConfig(experts=0.5, dataset=batches))
        return
    hf_sparse.prune(model, SparseConfig(experts=0.5, dataset=batches))
    expected = outputs(model, batches[0])[0]
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(outputs(again, batches[0])[0], expected)
