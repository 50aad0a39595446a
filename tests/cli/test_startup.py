"""Programs that `hf-sparse run` starts: their transformers knows sparse checkpoints."""

import os
import subprocess
import sys

import pytest

from hf_sparse_cli import startup
from hf_sparse_cli.commands import serve
from hf_sparse_cli.failures import Failure


def run(*command, **variables):
    return subprocess.run(
        [sys.executable, "-m", "hf_sparse_cli", "run", *command],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def started():
    """What a Python that another one starts says of what it has imported."""
    inner = (
        "import sys; before = 'hf_sparse' in sys.modules; import transformers; "
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known; "
        "print(before, 'hf_sparse' in known, sys.argv[1:])"
    )
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"
    return run("python", "-c", code, inner, "--help", "--", "x")


def test_transformers_knows_the_method_in_every_python_that_it_starts(started):
    assert started.returncode == 0, started.stderr
    assert started.stdout.split()[1] == "True"


def test_nothing_is_imported_before_transformers_is(started):
    assert started.stdout.split()[0] == "False"


def test_options_behind_the_program_are_its_own(started):
    assert started.stdout.split(maxsplit=2)[2].strip() == "['--help', '--', 'x']"


def test_the_exit_code_is_the_program_s():
    assert run("--", "python", "-c", "raise SystemExit(7)").returncode == 7


def test_a_sitecustomize_of_the_user_s_runs_as_well(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('mine')")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = run("python", "-c", "print('program')", PYTHONPATH=path)
    # hf-sparse's own Python reads it, too.
    assert done.stdout.split() == ["mine", "mine", "program"]


def test_a_program_that_is_not_there_is_an_error(cli):
    code, _, said = cli("run", "no-such-program", "--x")
    assert code == 1
    assert "there is no program 'no-such-program' on the PATH" in said


def test_serving_says_at_once_what_is_missing(cli, monkeypatch):
    monkeypatch.setattr(serve, "PACKAGES", ("json", "no_such_package"))
    code, _, said = cli("serve", "./nowhere")
    assert code == 1
    assert "serving needs no_such_package: pip install 'transformers[serving]'" in said
    monkeypatch.setattr(serve, "PACKAGES", ())
    assert "there is no folder ./nowhere" in cli("serve", "./nowhere")[2]


def test_serving_is_transformers_own_with_its_own_options(cli, monkeypatch, model_path):
    seen = []

    def become(command):
        seen.append(command)
        raise Failure("started")

    monkeypatch.setattr(serve, "PACKAGES", ())
    monkeypatch.setattr(serve, "become", become)
    cli("serve", model_path, "--port", 8001, "--compile")
    assert seen == [["transformers", "serve", str(model_path), "--port", "8001", "--compile"]]


def test_programs_beside_this_python_are_found_first():
    made = startup.environment({"PATH": "/elsewhere"})
    assert made["PATH"].split(os.pathsep) == [os.path.dirname(sys.executable), "/elsewhere"]
