"""Errors as one sentence that says what to do."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator

from .plain import printable


class Failure(Exception):  # noqa: N818 - what went wrong is the user's to mend
    """A command can't do what was asked; the message is the sentence that the user reads."""


def sentence(error: BaseException) -> str:
    """One line for an error: its own if it is meant for people, else what lies at its root."""
    for cause in _chain(error):
        text = _known(cause)
        if text is not None:
            return printable(" ".join(text.split()))
    first = printable(next(iter(str(error).strip().splitlines()), ""))
    return f"{type(error).__name__}: {first} (--debug shows where it comes from)"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from, outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _known(error: BaseException) -> str | None:
    """The sentence for an error that is no bug; None for any other."""
    package = sys.modules.get("hf_sparse")
    if isinstance(error, Failure) or (package and isinstance(error, package.HfSparseError)):
        return str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full: {error}"
    return _hub(error)


def _hub(error: BaseException) -> str | None:
    """The sentence for what the Hub, or the way there, refused."""
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and this needs the Hub: unset it, or use a local folder"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return "this needs a Hub token, and there is none: run `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return f"access to this repository has to be asked for on its page: {error.server_message}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the Hub has no such repository, or this token may not see it"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "the Hub can't be reached, and it is not in the cache"
    if isinstance(error, errors.RevisionNotFoundError | errors.RemoteEntryNotFoundError):
        return f"the repository has no such revision or file: {error.server_message}"
    if isinstance(error, errors.HfHubHTTPError):
        return _http(error.response.status_code, str(error).strip().splitlines()[0])
    if isinstance(error, errors.HFValidationError):
        return f"this is neither a folder nor a Hub id: {error}"
    return None


def _http(status: int, message: str) -> str:
    if status == 401:
        return (
            "the Hub refused the token, it is wrong or has expired: run `hf auth login` or set "
            f"HF_TOKEN ({message})"
        )
    if status == 403:
        return f"this token may not do that on the Hub, is the repository yours? ({message})"
    return f"the Hub refused: {message}"
