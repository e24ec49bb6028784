"""The kernels' sources for other architectures, and the Arm kernels in an emulator against those of this machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pard_onnx.runtime import kernels

ROOT = Path(__file__).parents[3]
NATIVE = ROOT / "runtime" / "kernels" / "native"
GUARDS = {"immintrin.h": "PARD_X86_64", "arm_neon.h": "PARD_AARCH64"}
COMPILERS = [shutil.which(name) for name in (os.environ.get("CXX", "c++"), "aarch64-linux-gnu-g++")]
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
# Processors of the emulator, and the instruction set that is chosen on each.
PROCESSORS = {"max": "neon-i8mm", "neoverse-n1": "neon-dotprod", "cortex-a72": "reference"}


def test_intrinsics_are_compiled_on_their_own_architecture_alone() -> None:
    guarded = 0
    for source in NATIVE.rglob("*.cpp"):
        text = source.read_text("utf-8")
        for header, macro in GUARDS.items():
            if f"#include <{header}>" in text:
                before = text[: text.index(f"#include <{header}>")]
                assert f"#if defined({macro})" in before, source.name
                assert text.endswith("#endif\n"), source.name
                guarded += 1
    assert guarded == len(kernels.ISAS) - 1  # all but the portable one


def test_every_list_names_the_same_instruction_sets() -> None:
    sources = "".join(path.read_text("utf-8") for path in sorted(NATIVE.rglob("*.cpp")))
    assert set(re.findall(r'const Isa \w+ = \{"([^"]+)"', sources)) == set(kernels.ISAS)
    names = re.search(r"NAMES\[\] = \{(.*)\};", (ROOT / "fuzz" / "shapes.cpp").read_text("utf-8"))
    assert names is not None and tuple(re.findall(r'"([^"]+)"', names[1])) == kernels.ISAS


def shapes(compiler: str, folder: Path) -> Path:
    """fuzz/shapes.cpp with the library's sources, built for the compiler's architecture."""
    out = folder / Path(compiler).name
    sources = [*NATIVE.rglob("*.cpp"), ROOT / "fuzz" / "shapes.cpp", ROOT / "fuzz" / "coverage.cpp"]
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-static", "-pthread", f"-I{NATIVE}"]
    subprocess.run([compiler, *flags, *sources, "-o", out], check=True)
    return out


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(None in (*COMPILERS, EMULATOR), reason="no cross compiler for Arm, or no emulator (qemu-user)")
def test_arm_kernels_agree_with_this_machine(tmp_path: Path) -> None:
    """Each kernel equals the reference, which packs and computes the same bits on both architectures."""
    here, arm = (shapes(str(compiler), tmp_path) for compiler in COMPILERS)
    printed = r"60 rounds, best (\S+), digest (\w+)\n"
    found = re.fullmatch(printed, subprocess.run([here, "60", "3"], check=True, capture_output=True, text=True).stdout)
    assert found is not None
    for processor, isa in PROCESSORS.items():
        command = [str(EMULATOR), "-cpu", processor, arm, "60", "3"]
        emulated = re.fullmatch(printed, subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        assert emulated is not None and (emulated[1], emulated[2]) == (isa, found[2])
