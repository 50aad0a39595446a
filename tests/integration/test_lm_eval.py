"""lm-eval on a sparse checkpoint, with a task of our own in a local folder."""

import functools
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse
from hf_sparse import EvaluationError
from hf_sparse_cli import main

pytest.importorskip("lm_eval", reason="needs hf_sparse[eval]")
pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's own

QUESTIONS = {
    "The function returns": (" a list", " a kitchen", " the"),
    "SQL is a": (" table", " banana", " query language"),
    "If the value is": (" NULL", " green", " not an integer"),
    "import": (" sys", " the", " potatoes"),
    "The server": (" is", " module is", " returns"),
}
TASK = """
task: questions
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 7}
"""


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    """Nothing is left in the user's cache."""
    config = pytest.importorskip("datasets").config
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module", autouse=True)
def _one_manager():
    """lm-eval looks through its thousands of tasks once."""
    tasks = pytest.importorskip("lm_eval.tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "TaskManager", functools.cache(tasks.TaskManager))
        yield


@pytest.fixture(scope="module")
def sparse(short_examples, tmp_path_factory):
    path, folder = short_examples / "models" / "tiny-llama-docs", tmp_path_factory.mktemp("sparse")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    hf_sparse.prune(model, hf_sparse.SparseConfig(method="magnitude", sparsity=0.6))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path).save_pretrained(folder)
    return folder


def most_probable(model, tokenizer, question, choices) -> int:
    """The choice whose tokens have the largest sum of log-probabilities, in float64."""
    start, sums = len(tokenizer(question).input_ids), []
    for choice in choices:
        ids = tokenizer(question + choice).input_ids
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        sums.append(sum(float(logits[t - 1, ids[t]]) for t in range(start, len(ids))))
    return sums.index(max(sums))


@pytest.fixture(scope="module")
def task(sparse, tmp_path_factory):
    """A folder with the task; the model answers three of its five questions right."""
    model, tokenizer = (
        auto.from_pretrained(sparse) for auto in (AutoModelForCausalLM, AutoTokenizer)
    )
    rows = []
    for number, (question, choices) in enumerate(QUESTIONS.items()):
        chosen = most_probable(model, tokenizer, question, choices)
        answer = chosen if number < 3 else (chosen + 1) % 3
        rows.append({"question": question, "choices": choices, "answer": answer})
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "questions.yaml").write_text(TASK.replace("FILE", str(folder / "q.jsonl")))
    return folder


def test_eval_runs_a_task_on_a_sparse_checkpoint(sparse, task, capsys):
    options = ["--tasks", "questions", "--include-path", str(task), "--batch-size", "2", "--json"]
    with pytest.raises(SystemExit) as ended:
        main(["eval", str(sparse), *options])
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)["tasks"]
    assert found["results"]["questions"]["acc"] == 0.6
    assert found["samples"] == {"questions": 5}
    assert found["versions"] == {"questions": 7}


@pytest.mark.slow  # lm-eval's own imports; that programs run so: cli/test_startup.py
def test_the_stock_program_runs_it_through_hf_sparse_run(sparse, task, tmp_path):
    arguments = [
        "lm_eval",
        "run",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={sparse}",
        "--device",
        "cpu",
    ]
    where = ["--tasks", "questions", "--include_path", task, "--output_path", tmp_path / "results"]
    done = subprocess.run(
        [sys.executable, "-m", "hf_sparse_cli", "run", *map(str, [*arguments, *where])],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "results").rglob("results*.json")
    assert json.loads(file.read_text())["results"]["questions"]["acc,none"] == 0.6


def test_a_task_that_lm_eval_does_not_know_is_named(trained, tokenizer, task, tmp_path):
    with pytest.raises(EvaluationError, match="lm-eval has no task 'no_such_task'"):
        hf_sparse.evaluate_tasks(trained, tokenizer, ["no_such_task"], include_path=task)
    with pytest.raises(EvaluationError, match="nowhere' is no folder"):
        hf_sparse.evaluate_tasks(trained, tokenizer, ["x"], include_path=tmp_path / "nowhere")
