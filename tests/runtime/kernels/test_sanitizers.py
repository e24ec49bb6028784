"""The kernels' C++ under the compiler's sanitizers: fuzz.cpp, compiled with the library's sources."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[3] / "runtime" / "kernels" / "native"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
NEEDS_SESSION = ("op.cpp", "attention_op.cpp", "node.cpp")  # ONNX Runtime's side: test_*operator.py
ROUNDS = 400


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_clean(sanitizer: str, tmp_path: Path) -> None:
    """Whatever a sanitizer reports ends the program."""
    sources = [path for path in SOURCES.rglob("*.cpp") if path.name not in NEEDS_SESSION]
    sources.append(Path(__file__).with_name("fuzz.cpp"))
    program = tmp_path / "fuzz"
    flags = ["-std=c++17", "-O1", "-g", "-ffp-contract=off", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    subprocess.run([str(COMPILER), *flags, f"-I{SOURCES}", *sources, "-o", program, "-pthread"], check=True)
    done = subprocess.run([program, str(ROUNDS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"{ROUNDS} rounds\n"
