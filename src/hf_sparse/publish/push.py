"""`push_to_hub`: all of a sparse model in one commit, so that the repository is never between two.

Large files are stored by their content before the commit: a push that broke off sends only what
is missing when it is repeated.
"""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError

from ..calibration.tokenizers import known_processor
from ..checkpoint.commit import stale_files
from ..core.logging import get_logger
from ..core.sizes import read_size
from .card import model_card, write_card
from .hub_errors import pushing
from .hub_files import CARD

logger = get_logger(__name__)

# How the files of tokenizers and processors begin.
PROCESSORS = ("tokenizer", "processor", "preprocessor")


def push_to_hub(
    model: Any,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: list[str] | str | None = None,
) -> str:
    """Push a sparse model: weights, configs, reports (JSON and HTML), tokenizer and model card.

    The tokenizer, or processor, is the one that calibration used in this process, or else the one
    beside the files that the model was loaded from; none is pushed if neither is there, and what
    the repository has of one stays. So does a model card that someone wrote, except that tags are
    added to it. Weight files of an earlier push that this one doesn't replace are deleted.

    Args:
        model: the sparse model.
        repo_id: "name" or "owner/name"; created if it isn't there.
        commit_message: default "Upload " and the model's class.
        commit_description: default none.
        private: whether a new repository is private; None for the owner's default.
        token: default the one that `hf auth login` stored, or HF_TOKEN.
        revision: branch to push to, created if it isn't there. Default the main one.
        create_pr: propose the commit as a pull request.
        max_shard_size: of a weight file: bytes, or a text like "50GB" or "50GiB".
        tags: for the model card, beside its own.

    Returns:
        The commit's URL, as huggingface_hub's `CommitInfo`.

    Raises:
        ConfigError: max_shard_size is no size.
        HubError: the Hub refused, or can't be reached; the repository is as it was.
        SaveError: there was no room to write the files that are to be pushed.
    """
    shard_size = read_size("max_shard_size", max_shard_size)
    api = HfApi(library_name="hf_sparse", library_version=version("hf_sparse"), token=token)
    with pushing(repo_id, token):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr/"):
            _create_branch(api, repo_id, revision, create_pr)
        held = api.list_repo_files(repo_id, revision=revision)
        card = None
        if CARD in held:
            card = Path(api.hf_hub_download(repo_id, CARD, revision=revision))
    with tempfile.TemporaryDirectory(prefix="hf-sparse-") as temporary:
        folder = Path(temporary)
        model.save_pretrained(folder, max_shard_size=shard_size)
        model.hf_quantizer.write_page(model, folder)
        if not any(name.startswith(PROCESSORS) for name in held):
            _save_processor(model, folder)
        labels = [tags] if isinstance(tags, str) else [*(model.model_tags or ()), *(tags or ())]
        write_card(model_card(model, folder, repo_id, labels), folder, card)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): path for path in paths}
        additions = [CommitOperationAdd(name, path) for name, path in files.items()]
        with pushing(repo_id, token):
            stale = stale_files(
                files,
                held,
                lambda name: Path(api.hf_hub_download(repo_id, name, revision=revision)),
            )
            deletions = [CommitOperationDelete(name) for name in stale]
            return api.create_commit(
                repo_id,
                [*additions, *deletions],
                commit_message=commit_message or f"Upload {type(model).__name__}",
                commit_description=commit_description,
                create_pr=create_pr,
                revision=revision,
            )


def _create_branch(api: HfApi, repo_id: str, branch: str, create_pr: bool) -> None:
    """Make sure that a branch is there; whoever only proposes a change can't make one."""
    try:
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    except HfHubHTTPError as error:
        if not (create_pr and error.response.status_code == 403):
            raise


def _save_processor(model: Any, folder: Path) -> None:
    processor = known_processor(model)
    if processor is not None:
        processor.save_pretrained(folder)
    elif model.main_input_name == "input_ids":
        logger.warning(
            "no tokenizer is known for the model, so none is pushed: tokenizer.push_to_hub adds it"
        )
