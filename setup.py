"""The native part of the build, and what names the repository; everything else is in pyproject.toml.

The kernels are a plain shared library, not a Python module: its name carries no Python version, a wheel that has
it is for any Python 3 of its platform. Where it cannot be built, a line of the build's output says why, and the package
is installed without it. PARD_ONNX_BUILD_KERNELS=required makes that an error, PARD_ONNX_BUILD_KERNELS=off builds none.
"""

import os
import platform
import re
import struct
import sys
import tomllib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, CompileError

from distutils.util import get_platform  # isort: skip  setuptools' own, which has it also where Python has none

NAME = "pard_onnx.runtime.kernels._cpu"
NATIVE = Path("runtime", "kernels", "native")
VARIABLE, CHOICES = "PARD_ONNX_BUILD_KERNELS", ("auto", "required", "off")

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT / NATIVE), str(ROOT / "packaging")]
import kernel_sources  # noqa: E402 need the paths above
import long_description  # noqa: E402


def build_choice() -> str:
    choice = os.environ.get(VARIABLE) or "auto"
    if choice not in CHOICES:
        raise SystemExit(f"{VARIABLE}={choice}: takes {', '.join(CHOICES)}")
    return choice


def report_not_built(reason: str) -> None:
    """Says that the package comes without kernels; ends the build where they are required."""
    line = f"pard-onnx: the CPU kernels are not built: {reason}"
    if build_choice() == "required":
        raise SystemExit(f"{line} ({VARIABLE}=required)")
    print(f"{line}. ONNX Runtime's kernels will run instead, more slowly", file=sys.stderr)


def target_machine() -> str:
    """The processor that the library is for. On macOS it is one: the one of ARCHFLAGS, or this machine's."""
    if sys.platform == "darwin":
        named = re.findall(r"-arch\s+(\S+)", os.environ.get("ARCHFLAGS", "")) or [platform.machine()]
        if len(named) == 1:
            os.environ["ARCHFLAGS"] = f"-arch {named[0]}"
            os.environ.setdefault("_PYTHON_HOST_PLATFORM", f"{get_platform().rpartition('-')[0]}-{named[0]}")
    machine = get_platform().rpartition("-")[2]
    return machine if struct.calcsize("P") == 8 else f"{machine} with 32 bits"


def kernel_extensions() -> list[Extension]:
    """The library as setuptools builds it; none where it is switched off, or not written for the processor."""
    if build_choice() == "off":
        return []
    machine = target_machine()
    architecture = kernel_sources.architecture_of(machine)
    if architecture is None:
        known = ", ".join(one.name for one in kernel_sources.ARCHITECTURES)
        report_not_built(f"there are none for {machine}, only for {known}")
        return []
    sources = kernel_sources.sources_for(architecture)
    extension = Extension(
        NAME,
        sources=[(NATIVE / source).as_posix() for source in sources],
        depends=[path.as_posix() for path in sorted(NATIVE.rglob("*.h"))],
        include_dirs=[NATIVE.as_posix()],
        language="c++",
        optional=True,
    )
    extension.own_flags = {(NATIVE / source).as_posix(): list(flags) for source, flags in sources.items() if flags}
    return [extension]


class BuildKernels(build_ext):
    """Differs from build_ext in flags, in the file's name, and in what it says of a failure."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split("."))) + (".dll" if os.name == "nt" else ".so")

    def get_export_symbols(self, ext):
        return []  # marked in the sources; build_ext would ask for PyInit__cpu

    def copy_extensions_to_source(self):
        for ext in self.extensions:  # running processes have the old file mapped: the new one is another file
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()

    def build_extension(self, ext):
        msvc = self.compiler.compiler_type == "msvc"
        ext.extra_compile_args = list(kernel_sources.MSVC_FLAGS if msvc else kernel_sources.UNIX_FLAGS)
        try:
            if not msvc:  # which needs no permission to use an intrinsic
                self.compile_sources_with_own_flags(ext)
            super().build_extension(ext)
        except (BaseError, CCompilerError, CompileError) as error:
            report_not_built(f"the C++ compiler failed ({error}); install one, such as g++, clang or MSVC")
            raise

    def compile_sources_with_own_flags(self, ext):
        for source, flags in ext.own_flags.items():
            ext.sources.remove(source)
            ext.extra_objects += self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                include_dirs=ext.include_dirs,
                extra_postargs=[*ext.extra_compile_args, *flags],
                depends=ext.depends,
            )
        ext.own_flags = {}


class Wheel(bdist_wheel):
    def get_tag(self):
        built = any(Path(self.bdist_dir or ".").rglob("_cpu.*"))
        return ("py3", "none", super().get_tag()[2] if built else "any")


VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
REPOSITORY = long_description.repository(ROOT)
README = (ROOT / "README.md").read_text(encoding="utf-8")

setup(
    ext_modules=kernel_extensions(),
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
    long_description=long_description.description(README, REPOSITORY, VERSION),
    long_description_content_type="text/markdown",
    project_urls=long_description.project_urls(REPOSITORY, VERSION),
)
