"""Sweep over model types: `python tests/sweep --kind "causal LM" llama mamba`.

Each type runs in a process of its own, so that a crash or an endless loop ends that type alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing.connection import wait
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_SPARSE_MEASURE", "0")

import torch
from check import FAIL, KINDS, PASS, Outcome, check, types_of
from table import markdown
from transformers.utils import logging

CONTEXT = multiprocessing.get_context("fork")  # imports are paid for once


def sweep(jobs: list[tuple[str, str]], processes: int, timeout: float) -> Iterator[Outcome]:
    """Check every (kind, type), a few at a time; print and yield what came of each."""
    waiting, running = list(reversed(jobs)), {}
    while waiting or running:
        while waiting and len(running) < processes:
            job = waiting.pop()
            receiver, sender = CONTEXT.Pipe(duplex=False)
            process = CONTEXT.Process(target=_work, args=(*job, sender), daemon=True)
            process.start()
            sender.close()
            running[receiver] = process, job, time.monotonic() + timeout
        ready = wait(list(running), timeout=1.0)
        for receiver, (process, job, deadline) in list(running.items()):
            if receiver not in ready and time.monotonic() < deadline:
                continue
            outcome = _receive(receiver, job) if receiver in ready else None
            process.kill()
            process.join()
            del running[receiver]
            outcome = outcome or Outcome(*job, FAIL, f"no result after {timeout:.0f} s")
            _print(outcome)
            yield outcome


def _work(kind: str, model_type: str, sender: object) -> None:
    warnings.simplefilter("ignore")
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    sender.send(check(kind, model_type))  # type: ignore[attr-defined]


def _receive(receiver: object, job: tuple[str, str]) -> Outcome:
    try:
        return receiver.recv()  # type: ignore[attr-defined]
    except EOFError:
        return Outcome(*job, FAIL, "the process died")


def _print(outcome: Outcome) -> None:
    print(
        f"{outcome.status:<20} {outcome.kind}: {outcome.model_type} "
        f"({outcome.layers} layers, {outcome.never_called} never called, {outcome.seconds:.1f} s) "
        f"{outcome.reason}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="model types; default: all of the kinds")
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="default: all")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=120, help="seconds per type")
    parser.add_argument("--json", type=Path, help="write the outcomes here")
    parser.add_argument(
        "--known", type=Path, nargs="*", default=[], help="outcomes of earlier runs to add"
    )
    parser.add_argument("--markdown", type=Path, help="write the table here, e.g. docs/models.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    jobs = [
        (kind, model_type)
        for kind in arguments.kind or KINDS
        for model_type in types_of(kind)
        if not arguments.types or model_type in arguments.types
    ]
    known = {}
    for path in arguments.known:
        found = [Outcome(**entry) for entry in json.loads(path.read_text())]
        known |= {(outcome.kind, outcome.model_type): outcome for outcome in found}
    if not arguments.types and known:
        jobs = [job for job in jobs if job not in known]
    order = [(kind, model_type) for kind in KINDS for model_type in types_of(kind)]
    outcomes = [known[job] for job in order if job in known]
    for outcome in sweep(jobs, arguments.processes, arguments.timeout):
        known[outcome.kind, outcome.model_type] = outcome
        outcomes = [known[job] for job in order if job in known]
        if arguments.json:
            arguments.json.write_text(json.dumps([asdict(o) for o in outcomes], indent=1))
    if arguments.markdown:
        arguments.markdown.write_text(markdown(outcomes, bool(arguments.known)))
    for kind in dict.fromkeys(o.kind for o in outcomes):
        of_kind = [o.status for o in outcomes if o.kind == kind]
        passed, failed = of_kind.count(PASS), of_kind.count(FAIL)
        print(f"{kind}: {passed} of {passed + failed} pass, {len(of_kind)} registered")
    sys.exit(any(o.status == FAIL for o in outcomes))


if __name__ == "__main__":
    main()
