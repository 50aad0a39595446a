"""Every error is one sentence."""

import errno
import re

import pytest
from huggingface_hub import errors

import hf_sparse
from hf_sparse_cli.failures import Failure, sentence


def caused(outer, inner):
    try:
        raise outer from inner
    except Exception as error:
        return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (Failure("do\nthis"), "do this"),
        (Failure("\x1b[31m\u202ered"), r"^\\x1b\[31m\\u202ered$"),
        (ValueError("\x1b]0;title\x07"), r"^ValueError: \\x1b\]0;title\\x07 "),
        (hf_sparse.ConfigError("seed=-1"), "seed=-1"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full: .*No space left"),
        (errors.OfflineModeIsEnabled("long story"), "HF_HUB_OFFLINE is set"),
        (errors.LocalTokenNotFoundError("x"), "needs a Hub token.*hf auth login"),
        (caused(ValueError("a"), Failure("b")), "^b$"),
        (caused(OSError("a\nb"), hf_sparse.FormatError("c")), "^c$"),
        (
            ZeroDivisionError("division by zero\nmore"),
            r"^ZeroDivisionError: division by zero \(--d",
        ),
        (KeyError(), r"^KeyError:  \(--debug shows"),
    ],
)
def test_an_error_is_one_sentence_from_where_it_began(error, words):
    found = sentence(error)
    assert "\n" not in found
    assert re.search(words, found), found
