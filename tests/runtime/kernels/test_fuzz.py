"""The fuzzers of fuzz/, for a bounded time; fuzz/run runs them for as long as one likes."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[3] / "fuzz"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
needs_compiler = pytest.mark.skipif(COMPILER is None or os.name == "nt", reason="no C++ compiler with sanitizers")


def test_mutated_graphs_are_rewritten_or_refused() -> None:
    spec = importlib.util.spec_from_file_location("graphs", FUZZ / "graphs.py")
    assert spec is not None and spec.loader is not None
    graphs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(graphs)
    found = graphs.run(rounds=600, seed=1)
    assert sum(found.values()) == 600 and min(found.values()) > 0


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_kernels_under_sanitizers(sanitizer: str, tmp_path: Path) -> None:
    """Whatever a sanitizer reports ends the program."""
    subprocess.run([FUZZ / "build", tmp_path, sanitizer], check=True)
    for program in (
        ["./shapes", "400"],
        ["./operators", "--faults", FUZZ / "corpus"],
        ["./operators", "--seconds", "60", FUZZ / "corpus"],
    ):
        done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
