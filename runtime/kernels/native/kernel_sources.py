"""What the CPU kernels are built of: the sources and flags for each processor architecture.

setup.py builds them with the local compiler and packaging/wheels.py with zig; both read this table. A new source has
its line in `COMMON_SOURCES` or in the architecture that it is for. This file is no part of the installed package.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
# What every architecture builds: the operators, packing, and the portable kernels
COMMON_SOURCES = (
    "attention/attention.cpp",
    "isa/dispatch.cpp",
    "isa/gemm_reference.cpp",
    "matmul/matmul.cpp",
    "matmul/pack.cpp",
    "ort/attention_op.cpp",
    "ort/node.cpp",
    "ort/op.cpp",
    "ort/ort_abi.cpp",
    "ort/testing.cpp",
    "ort/weights_file.cpp",
)
MSVC_FLAGS = ("/std:c++17", "/O2", "/EHsc")
# No contraction: every instruction set must round alike. GCC 12 warns about its own intrinsics' headers.
UNIX_FLAGS = (
    "-std=c++17",
    "-O3",
    "-g0",  # Python was built with -g
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-ffp-contract=off",
    "-Wno-maybe-uninitialized",
)


@dataclass(frozen=True, slots=True)
class Architecture:
    """A processor architecture for which the kernels are built."""

    name: str
    aliases: frozenset[str]  # other names of it, in lower case: of platform.machine(), of wheels' tags
    sources: Mapping[str, tuple[str, ...]]  # its own sources, and the flags with which GCC and clang compile each


ARCHITECTURES = (
    Architecture(
        "x86_64",
        frozenset({"amd64", "x64"}),
        {"isa/cpu_x86.cpp": (), "isa/gemm_avx2.cpp": (), "isa/gemm_avx512vnni.cpp": (), "isa/gemm_avxvnni.cpp": ()},
    ),
    Architecture(
        "aarch64",
        frozenset({"arm64"}),
        {"isa/cpu_arm.cpp": (), "isa/gemm_dotprod.cpp": (), "isa/gemm_i8mm.cpp": ()},
    ),
)


def architecture_of(machine: str) -> Architecture | None:
    """The architecture that a system calls `machine`; None where there are no kernels for it."""
    name = machine.lower()
    return next((one for one in ARCHITECTURES if name == one.name or name in one.aliases), None)


def sources_for(architecture: Architecture) -> dict[str, tuple[str, ...]]:
    """All sources of the library for this architecture, relative to `FOLDER`, with the flags that each has alone."""
    return dict.fromkeys(COMMON_SOURCES, ()) | dict(architecture.sources)


def exported_names() -> frozenset[str]:
    """The functions that the sources mark with PARD_EXPORT: all that the library may export."""
    text = "\n".join((FOLDER / source).read_text(encoding="utf-8") for source in COMMON_SOURCES)
    return frozenset(re.findall(r"^PARD_EXPORT\b[^(;{]*?(\w+)\(", text, re.MULTILINE))
