"""Whatever is written survives: every file event fails or is the last one of its process, and nothing is lost.

After each fault the old or the new content is there, whole; errors are one line that names the file; the same command
then succeeds and leaves no scratch file.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
KINDS = ("kill", "torn", "ENOSPC", "EIO", "short", "full", "broken")
COMPILER = shutil.which("cc")
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or COMPILER is None, reason="needs Linux's LD_PRELOAD and a C compiler"
)
Inject = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shim") / "shim.so"
    assert COMPILER
    command = [COMPILER, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(path), str(HERE / "shim.c"), "-ldl"]
    subprocess.run(command, check=True)
    return path


@pytest.fixture
def inject(library: Path, tmp_path: Path, record_property: Callable[[str, object], None]) -> Inject:
    """inject(scenario, kinds, exchange=, first=, step=): one report a fault, none of which has a problem."""
    inputs = tmp_path / "inputs"
    inputs.mkdir()

    def run(scenario: str, kinds: tuple[str, ...] = KINDS, **options: Any) -> list[dict[str, Any]]:
        request = {
            "scenario": scenario, "kinds": kinds, "root": str(tmp_path / "root ü"), "inputs": str(inputs),
            "library": str(library), "exchange": True, "first": 1, "step": 1, **options,
        }  # fmt: skip
        single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        paths = os.pathsep.join([str(HERE), str(HERE.parent / "support")])
        environment = os.environ | single | {
            "LD_PRELOAD": str(library), "PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        command = [sys.executable, str(HERE / "injector.py"), json.dumps(request)]
        done = subprocess.run(command, env=environment, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        start = next(number for number, line in enumerate(lines) if line.startswith('{"events"'))
        reports = [json.loads(line) for line in lines[start + 1 :]]
        found = [report for report in reports if report["problems"]]
        assert not found, f"{len(found)} of {len(reports)}: {json.dumps(found[:5], indent=1)}"
        counts = dict(Counter(report["kind"] for report in reports))
        record_property("faults", counts)
        print(f"faults in {scenario}: {len(reports)} {counts}")
        return reports

    return run


@pytest.mark.parametrize("exchange", (True, False))
@pytest.mark.parametrize("scenario", ("file", "folder", "first folder"))
def test_atomic_writing(inject: Inject, scenario: str, exchange: bool) -> None:
    """Without an exchange of names the old folder has a scratch name for a moment, and gets its name back."""
    reports = inject(scenario, exchange=exchange)
    assert {report["kind"] for report in reports} == set(KINDS)
    assert {report["event"].split()[0] for report in reports} >= {"open", "write", "fsync", "rename"}


@pytest.mark.parametrize("scenario", ("cache", "hub"))
def test_caches(inject: Inject, scenario: str) -> None:
    inject(scenario)


def test_saved_chats(inject: Inject, write_artifact: Callable[..., Path], tmp_path: Path) -> None:
    write_artifact(tmp_path / "inputs" / "target", "target", kv_rows=320)
    inject("chat", ("kill", "full"))


def test_a_quantized_export(inject: Inject) -> None:
    inject("quantize", ("kill", "ENOSPC"), first=3, step=23)


@pytest.mark.slow
def test_saved_chats_at_every_event(inject: Inject, write_artifact: Callable[..., Path], tmp_path: Path) -> None:
    write_artifact(tmp_path / "inputs" / "target", "target", kv_rows=320)
    assert len(inject("chat")) > 50


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ("gguf", "hub on another disk"))
def test_folders_of_the_cache_at_every_event(inject: Inject, scenario: str) -> None:
    assert len(inject(scenario)) > 70


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ("quantize", "export"))
@pytest.mark.parametrize("exchange", (True, False))
def test_exports_at_every_event(inject: Inject, scenario: str, exchange: bool) -> None:
    assert len(inject(scenario, exchange=exchange)) > 300


@pytest.mark.slow
def test_an_export_with_calibration_text(inject: Inject) -> None:
    inject("calibrated quantize", ("kill", "full"), step=5)
