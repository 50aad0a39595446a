"""Writes multiple-choice tasks of BIG-bench for lm-eval, and says how to run them.

    python examples/bigbench_tasks.py FOLDER --tasks general_knowledge implicatures

pip fetches the package bigbench into FOLDER, once (358 MB). Choices are not part of a question.
"""

import argparse
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "bigbench-1.0.0"
TASKS = PACKAGE + "/bigbench/benchmark_tasks/{}/task.json"
TASK = {
    "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
    "doc_to_text": "{{question}}", "doc_to_choice": "choices", "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}  # fmt: skip


def questions(task: dict) -> Iterator[dict]:
    """Those that have one right choice."""
    before = task.get("task_prefix", "") + task.get("example_input_prefix", "\nQ: ")
    after = task.get("example_output_prefix", "\nA:").rstrip()
    for example in task["examples"]:
        choices, scores = map(list, zip(*example["target_scores"].items(), strict=True))
        if sum(scores) == max(scores) == 1:
            question = (before + example["input"] + after).strip()
            yield {"question": question, "choices": choices, "answer": scores.index(1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tasks", nargs="+", required=True)
    given = parser.parse_args()
    archive = given.folder / f"{PACKAGE}.tar.gz"
    if not archive.exists():
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(given.folder)]
        subprocess.run([*pip, "bigbench==1.0.0"], check=True)
    left = {TASKS.format(name): name for name in given.tasks}
    with tarfile.open(archive, "r|gz") as files:
        for member in files:
            if name := left.pop(member.name, None):
                data = given.folder.resolve() / f"{name}.jsonl"
                rows = questions(json.load(files.extractfile(member)))
                data.write_text("\n".join(map(json.dumps, rows)))
                task = {"task": name, **TASK, "dataset_kwargs": {"data_files": {"test": str(data)}}}
                (given.folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    if left:
        raise SystemExit(f"no JSON task of BIG-bench: {', '.join(left.values())}")
    print(f"hf-sparse eval MODEL --tasks {','.join(given.tasks)} --include-path {given.folder}")


if __name__ == "__main__":
    main()
