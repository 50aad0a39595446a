"""A user of the Hub in `hub_server`.

huggingface_hub reads HF_ENDPOINT once, so each client is a new process; its proxy settings let it
reach no other server than the test's.
"""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import fresh
from hub_server import WRITE_TOKEN, Hub
from safetensors.torch import load_file
from torch import Tensor

LAYERS = 14  # seven linear layers in each of two blocks

# Loads a repository with from_pretrained's arguments as JSON; writes logits to a file.
LOAD = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
import hf_sparse

repo, kwargs, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(repo, **json.loads(kwargs))
ids = torch.arange(3, 61).reshape(2, 29)
sparse = [m for m in model.modules() if isinstance(m, hf_sparse.SparseLinear)]
with torch.no_grad():
    save_file({"logits": model(ids).logits, "sparse": torch.tensor(len(sparse))}, out)
"""


@dataclass(frozen=True)
class Client:
    """Runs Python code in a new process that knows one Hub only."""

    hub: Hub
    home: Path

    def run(
        self, code: str, *args: object, imported: tuple[str, ...] = fresh.LOADED, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """The finished process; whether it failed is for the caller to say."""
        nowhere = "http://127.0.0.1:9"
        settings = {
            "HF_ENDPOINT": self.hub.url,
            "HF_TOKEN": WRITE_TOKEN,
            "HF_HOME": str(self.home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "TRANSFORMERS_VERBOSITY": "warning",
            "HF_SPARSE_MEASURE": "0",
            "HTTP_PROXY": nowhere,
            "HTTPS_PROXY": nowhere,
            "ALL_PROXY": nowhere,
            "NO_PROXY": "127.0.0.1",
        }
        # What the machine has set for Hugging Face or proxies is not the test's.
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_")
        inherited = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(foreign) and not key.upper().endswith("_PROXY")
        }
        done = fresh.run(code, *args, env=inherited | settings | env, imported=imported)
        assert not self.hub.unanswered, self.hub.unanswered
        return done

    def check(self, code: str, *args: object, **env: str) -> None:
        """Run code that has to succeed."""
        done = self.run(code, *args, **env)
        assert done.returncode == 0, done.stderr

    def logits(
        self,
        repo: str,
        out: Path,
        revision: str = "main",
        then: str = "",
        token: str | None = None,
        **env: str,
    ) -> Tensor:
        """What a process computes that loads the sparse model `repo`; `then` is run after it."""
        given = {"revision": revision, "token": token}
        self.check(LOAD + then, repo, json.dumps(given), out, **env)
        results = load_file(out)
        assert results["sparse"] == LAYERS
        return results["logits"]
