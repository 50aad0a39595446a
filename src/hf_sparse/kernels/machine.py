"""The machine and the libraries that something was made with."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch

from .cpu import library

# What a result can depend on, beside Python.
LIBRARIES = ("hf_sparse", "torch", "transformers")


@dataclass(frozen=True)
class Environment:
    """Where something was made.

    Attributes:
        processor: the processor's model name, as the system tells it.
        cores: logical cores that this process may use.
        threads: threads that torch computes with.
        instruction_set: the widest one that the kernels, or else torch, use.
        device: the accelerator's name, or "cpu".
        system: operating system and architecture.
        versions: of Python, torch, transformers and hf_sparse.
    """

    processor: str
    cores: int
    threads: int
    instruction_set: str
    device: str
    system: str
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def here(cls, device: torch.device) -> Environment:
        """This process, working on a device."""
        cuda = device.type == "cuda"
        affinity = getattr(os, "sched_getaffinity", None)  # Linux only
        return cls(
            processor=processor(),
            cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
            threads=torch.get_num_threads(),
            instruction_set=_instruction_set(),
            device=torch.cuda.get_device_name(device) if cuda else device.type,
            system=f"{platform.system()} {platform.machine()}",
            versions={"python": platform.python_version()}
            | {name: version(name) for name in LIBRARIES},
        )

    def __str__(self) -> str:
        """The hardware in a few words."""
        cpu = f"{self.processor} ({self.instruction_set}), {self.threads} threads"
        return cpu if self.device == "cpu" else f"{self.device}; {cpu}"


def _instruction_set() -> str:
    if library.unavailable_reason() is None:
        return list(library.paths())[-1]
    return torch.backends.cpu.get_cpu_capability()


@functools.cache
def processor() -> str:
    """The processor's model name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
