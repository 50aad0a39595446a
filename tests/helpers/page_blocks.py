"""The code blocks of a page of the documentation, and running them in order in one namespace.

`python page_blocks.py PAGE...` runs each page in the folder that is current, which has `examples`.
"""

import json
import re
import shlex
import sys
from pathlib import Path

from hf_sparse_cli import main


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """(language, code) of the page's blocks, in order."""
    pattern = rf"```({'|'.join(languages)})\n(.*?)```"
    return re.findall(pattern, page.read_text(encoding="utf-8"), flags=re.DOTALL)


def run_page(page: Path) -> None:
    """Run Python, and what calls hf-sparse of a shell block, and write what is a file."""
    namespace: dict = {}
    for language, block in blocks(page, "python", "json", "yaml", "sh"):
        if language == "python":
            exec(compile(block, page.name, "exec"), namespace)
        elif language == "json":
            json.loads(block)
        elif language == "yaml":  # its first line names the file
            Path(block.splitlines()[0].removeprefix("# ")).write_text(block, encoding="utf-8")
        else:
            run_commands(block)


def run_commands(block: str) -> None:
    for line in block.replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(line)
        if program == "hf-sparse":
            try:
                main(arguments)
            except SystemExit as ended:
                if ended.code:
                    raise AssertionError(f"exit code {ended.code}: {line}") from ended


if __name__ == "__main__":
    for name in sys.argv[1:]:
        run_page(Path(name))
