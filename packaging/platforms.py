"""The platforms that wheels are built for: a row each."""

from collections.abc import Mapping
from dataclasses import dataclass

import kernel_sources
from kernel_sources import Architecture

# Operator new and delete, which zig's C++ runtime defines as weak symbols. On macOS they cannot be hidden: zig's linker
# takes no list of exports there. That does no harm: whichever definition the system picks calls malloc and free.
CXX_OPERATORS = r"_Z(n[wa]|d[la])\w+"


@dataclass(frozen=True, slots=True)
class System:
    """What the libraries of one operating system have in common."""

    format: str  # ELF, PE or MACHO
    library: str  # the file's name, which runtime/kernels looks for
    link_flags: tuple[str, ...]
    dependencies: str  # a pattern: libraries that every installation of the system has
    further_exports: str = ""  # a pattern: names beside those that the sources mark
    libc: str = ""  # how the library names its libc.so, with the architecture's name in the place of {}


@dataclass(frozen=True, slots=True)
class Platform:
    """A wheel's platform, and what zig and the formats of libraries call it."""

    tag: str  # of the wheel; several tags have dots between them
    target: str
    system: System
    machines: Mapping[str, str]  # the processor, for each format

    @property
    def architecture(self) -> Architecture:
        """The row of kernel_sources that the library is built from."""
        found = kernel_sources.architecture_of(self.target.partition("-")[0])
        assert found is not None, self.target
        return found


# The version script, which library.py writes, hides what zig's C++ runtime would export.
ELF_FLAGS = ("-Wl,--version-script=exports.map", "-Wl,-soname,_cpu.so")
GLIBC = System("ELF", "_cpu.so", ELF_FLAGS, r"lib(c|m|dl|pthread)\.so\.\d|ld-linux-[\w-]+\.so\.\d")
# musl's loader takes libc.so and Alpine's name alike; the rules of musllinux know Alpine's alone.
MUSL = System("ELF", "_cpu.so", ELF_FLAGS, r"libc\.musl-\w+\.so\.1", libc="libc.musl-{}.so.1")
MACOS = System(
    "MACHO",
    "_cpu.so",
    ("-Wl,-install_name,@rpath/_cpu.so",),
    r"@rpath/_cpu\.so|/usr/lib/libSystem\.B\.dylib",
    rf"_{CXX_OPERATORS}|__mh_dylib_header|___dso_handle",
)
# /Brepro: a digest where the linker would write the time of the build
WINDOWS = System("PE", "_cpu.dll", ("-Wl,/Brepro",), r"(?i:kernel32|ntdll|api-ms-win-crt-[\w-]+)\.dll")

X86_64 = {"ELF": "X86_64", "PE": "AMD64", "MACHO": "X86_64"}
AARCH64 = {"ELF": "AARCH64", "PE": "ARM64", "MACHO": "ARM64"}

PLATFORMS = (
    Platform("win_amd64", "x86_64-windows-gnu", WINDOWS, X86_64),
    Platform("win_arm64", "aarch64-windows-gnu", WINDOWS, AARCH64),
    Platform("macosx_11_0_arm64", "aarch64-macos.11.0", MACOS, AARCH64),
    Platform("macosx_11_0_x86_64", "x86_64-macos.11.0", MACOS, X86_64),
    Platform("manylinux_2_17_x86_64.manylinux2014_x86_64", "x86_64-linux-gnu.2.17", GLIBC, X86_64),
    Platform("manylinux_2_17_aarch64.manylinux2014_aarch64", "aarch64-linux-gnu.2.17", GLIBC, AARCH64),
    Platform("musllinux_1_2_x86_64", "x86_64-linux-musl", MUSL, X86_64),
    Platform("musllinux_1_2_aarch64", "aarch64-linux-musl", MUSL, AARCH64),
)
PURE = "any"  # the wheel without kernels, for every other platform
