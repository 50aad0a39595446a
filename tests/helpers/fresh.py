"""Python code in processes of their own, forked from one that has imported what takes long.

That is torch and transformers without hf_sparse, or with it. As a program, this is that process: it
reads jobs as lines of JSON and answers each with the exit status.
"""

import atexit
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

LIMIT = 300  # seconds
PLAIN = ("torch._dynamo", "transformers.models.llama.modeling_llama")
LOADED = ("hf_sparse",)


def run(
    code: str, *args: object, env: dict[str, str] | None = None, imported: tuple[str, ...] = PLAIN
) -> subprocess.CompletedProcess:
    """What `python -c code args` would be, as subprocess.run with text captured.

    Args:
        code: is run as the main module.
        args: sys.argv[1:].
        env: the whole environment; that of this process if None.
        imported: PLAIN or LOADED, what the process has imported before.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        job = {
            "code": code,
            "args": [str(arg) for arg in args],
            "env": dict(os.environ) if env is None else env,
            "files": [str(out), str(err)],
        }
        server = _server(imported)
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(code, status, out.read_text(), err.read_text())


@cache
def _server(imported: tuple[str, ...]) -> subprocess.Popen:
    """Ends with this process: when its input is closed."""
    command = [sys.executable, __file__, *imported]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)
    return server


def _next_job() -> dict:
    """Forks for each job; returns it in the child alone."""
    for line in sys.stdin:
        child = os.fork()
        if not child:
            return json.loads(line)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)  # noqa: T201
    sys.exit()


def _read_hub_settings() -> None:
    """huggingface_hub reads the environment when it is imported."""
    from huggingface_hub import constants, hf_api

    importlib.reload(constants)
    hf_api.api.endpoint = constants.ENDPOINT


if __name__ == "__main__":
    for name in sys.argv[1:]:
        importlib.import_module(name)
    job = _next_job()
    signal.alarm(LIMIT)
    for stream, path in zip((1, 2), job["files"], strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    os.environ.clear()
    os.environ.update(job["env"])
    if "huggingface_hub" in sys.modules:
        _read_hub_settings()
    sys.argv = ["-c", *job["args"]]
    sys.path[0] = ""
    exec(job["code"], {"__name__": "__main__"})
