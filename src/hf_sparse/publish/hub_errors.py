"""What the Hub refuses, and what breaks on the way there, as one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import get_token

# httpx's in huggingface_hub 1, httpx2's in 2.
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from ..core.errors import HubError
from ..core.untrusted_text import printable

NO_TOKEN = "there is no Hub token: run `hf auth login`, set HF_TOKEN or pass token="


@contextmanager
def pushing(repo_id: str, token: bool | str | None) -> Iterator[None]:
    """Turn what goes wrong while pushing into a HubError of one sentence, its cause chained."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        reason = _reason(error, bool(token or get_token()))
        raise HubError(f"can't push to {repo_id!r}: {reason}") from error


def _reason(error: BaseException, has_token: bool) -> str:
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__  # the client wraps what happens to a large file
    said = one_line(error)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: unset it, or save to a folder and push later"
    if isinstance(error, HFValidationError):
        return f"that is no name of a repository, pass 'you/name' ({said})"
    if isinstance(error, HfHubHTTPError):
        return _refusal(error, said, has_token)
    if isinstance(error, LocalTokenNotFoundError):
        return NO_TOKEN
    if isinstance(error, HTTPError | ConnectionError | TimeoutError):
        return (
            f"the Hub can't be reached, or the connection broke off: push again when it is back, "
            f"files that arrived are not sent twice ({said})"
        )
    return said


def _refusal(error: HfHubHTTPError, said: str, has_token: bool) -> str:
    status = error.response.status_code
    if status == 401 and not has_token:
        return NO_TOKEN
    if status == 401:
        return (
            "the Hub refused the token, it is wrong or has expired: run `hf auth login`, set "
            f"HF_TOKEN or pass token= ({said})"
        )
    if status == 403:
        return (
            "the repository isn't yours, or the token may not write to it: push under your own "
            f"name, with a token that may write, or pass create_pr=True ({said})"
        )
    again = ": push again, files that arrived are not sent twice" if status >= 500 else ""
    return f"the Hub refused it{again} ({said})"


def one_line(error: BaseException) -> str:
    """An error's type, its server message or first line, as a terminal can show it."""
    lines = str(error).strip().splitlines()
    text = printable(getattr(error, "server_message", None) or next(iter(lines), ""), keep="\n")
    return f"{type(error).__name__}: {' '.join(text.split())}" if text else type(error).__name__
