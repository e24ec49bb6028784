"""Providers and threads: what is refused, and what each session is given."""

import subprocess
import sys
from pathlib import Path

import pytest

from pard_onnx.models.errors import BadInput, BadProvider
from pard_onnx.runtime.providers import table as providers
from pard_onnx.runtime.providers.discovery import require_installed
from pard_onnx.runtime.providers.table import provider_named
from pard_onnx.runtime.providers.threads import Threads, physical_cores


def test_the_nearest_provider_is_suggested() -> None:
    with pytest.raises(BadProvider, match="unknown provider 'DirectMl'; did you mean 'directml'"):
        provider_named("DirectMl")


def test_without_a_near_one_all_are_named() -> None:
    with pytest.raises(BadProvider, match="known are cpu, cuda, directml, rocm, migraphx, webgpu"):
        provider_named("zzz")


def test_a_provider_that_is_not_installed_names_its_extra() -> None:
    with pytest.raises(BadProvider, match=r"pip install .*\[rocm\]"):
        require_installed("rocm")


def test_without_onnxruntime_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BadProvider, match=r"pip install .*\[cpu\]"):
        require_installed("cpu")


def test_cpu_is_installed() -> None:
    assert require_installed("cpu") is providers.PROVIDERS["cpu"]


def test_threads_are_at_least_one() -> None:
    with pytest.raises(BadInput, match="threads must be from 1 to 512, not 0"):
        Threads(0)
    assert physical_cores() >= 0


SHARED = """
import sys, onnxruntime as ort
from pard_onnx import load
pair = load(*sys.argv[1:3], share_threads=True)
first = pair.generate("the fox", max_new_tokens=8).tokens
again = load(*sys.argv[1:3], threads=1, share_threads=True)
assert again.generate("the fox", max_new_tokens=8).tokens == first
# The pool is the process's: a later load without the wish works, and uses it.
assert load(*sys.argv[1:3]).generate("the fox", max_new_tokens=8).tokens == first
"""

APART = """
import sys, onnxruntime as ort
from pard_onnx import load
pair = load(*sys.argv[1:3])
# Other libraries' sessions, with pools of their own, are untouched.
ort.InferenceSession(sys.argv[1] + "/model.onnx", providers=["CPUExecutionProvider"])
"""


@pytest.mark.parametrize("program", [SHARED, APART], ids=["shared", "apart"])
def test_thread_pools_in_a_process_of_their_own(program: str, pair_folders: tuple[Path, Path]) -> None:
    command = [sys.executable, "-c", program, *map(str, pair_folders)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize("key", [None, 5])
def test_a_provider_is_text(key: object) -> None:
    with pytest.raises(BadProvider, match=f"a provider is one of cpu, .*, not {key}"):
        provider_named(key)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [513, "2", 1.5])
def test_threads_are_a_number_that_a_machine_has(count: object) -> None:
    with pytest.raises(BadInput, match="threads must be"):
        Threads(count)  # type: ignore[arg-type]
