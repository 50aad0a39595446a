"""The native core as an optional part of the wheel: setup.py beside pyproject.toml.

The library is loaded by ctypes and knows neither Python nor torch, so one wheel per platform serves
every Python 3 and every torch: it is tagged py3-none-<platform>, and its file name has no ABI tag.
Where it can't be compiled, `optional=True` turns the error into a warning and the package is
installed without it.
"""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

PACKAGE = "hf_sparse.kernels.cpu"
SOURCE = Path("src", *PACKAGE.split("."), "csrc")


class BuildLibrary(build_ext):
    """Builds a plain shared library instead of a Python module."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # no PyInit


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            f"{PACKAGE}._tiles",
            sources=sorted(str(path) for path in SOURCE.glob("*.cpp")),
            depends=sorted(str(path) for path in SOURCE.glob("*.h")),
            language="c++",
            # Instruction sets are chosen inside the files: the same flags serve all of them.
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-fvisibility=hidden"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
