"""The native part of the build; everything else is in pyproject.toml.

The kernels are a plain shared library, not a Python module: its name carries no Python version, a wheel that has
it is for any Python 3 of its platform, and where it cannot be built the package is installed without it.
"""

import os
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NAME = "pard_onnx.runtime.kernels._cpu"
SOURCES = Path("runtime", "kernels", "native")
MSVC_FLAGS = ["/std:c++17", "/O2", "/EHsc"]
# No contraction: every instruction set must round alike. GCC 12 warns about its own intrinsics' headers.
UNIX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",  # Python was built with -g
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-ffp-contract=off",
    "-Wno-maybe-uninitialized",
]


class BuildKernels(build_ext):
    """Differs from build_ext in flags, in the file's name, and in that a failure costs one line."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split("."))) + (".dll" if os.name == "nt" else ".so")

    def get_export_symbols(self, ext):
        return []  # marked in the sources; build_ext would ask for PyInit__cpu

    def copy_extensions_to_source(self):
        for ext in self.extensions:  # running processes have the old file mapped: the new one is another file
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()

    def build_extension(self, ext):
        ext.extra_compile_args = MSVC_FLAGS if self.compiler.compiler_type == "msvc" else UNIX_FLAGS
        super().build_extension(ext)


class Wheel(bdist_wheel):
    def get_tag(self):
        built = any(Path(self.bdist_dir or ".").rglob("_cpu.*"))
        return ("py3", "none", super().get_tag()[2] if built else "any")


setup(
    ext_modules=[
        Extension(
            NAME,
            sources=[path.as_posix() for path in sorted(SOURCES.rglob("*.cpp"))],
            depends=[path.as_posix() for path in sorted(SOURCES.rglob("*.h"))],
            include_dirs=[SOURCES.as_posix()],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
)
