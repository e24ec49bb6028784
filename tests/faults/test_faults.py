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

from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.manifest import Source

HERE = Path(__file__).parent
KINDS = ("kill", "torn", "ENOSPC", "EIO", "short", "full", "broken")
COMPILER = shutil.which("cc")
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux" or COMPILER is None, reason="needs Linux's LD_PRELOAD and a C compiler"),
    pytest.mark.timeout(3600),  # thousands of processes in the slow ones
]
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
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
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


@pytest.fixture
def target(inject: Inject, write_artifact: Callable[..., Path], tmp_path: Path) -> Path:
    """A target to chat with."""
    return write_artifact(tmp_path / "inputs" / "target", "target", kv_rows=320)


@pytest.fixture
def floats(inject: Inject, tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """An export in floats, and its checkpoint."""
    from pard_onnx.export.exporter import Job, export

    inputs = tmp_path / "inputs"
    checkpoint = Checkpoint.open(tiny(inputs / "model", layers=1, hidden=32, intermediate=32))
    export(Job(checkpoint, Source("tiny"), inputs / "floats", "fp32", verify=False))
    return inputs / "floats"


@pytest.mark.parametrize("scenario", ("file", "folder", "cache", "hub"))
def test_writing(inject: Inject, scenario: str) -> None:
    reports = inject(scenario, ("kill", "ENOSPC"))
    calls = {"open", "write", "fsync", "rename"} if scenario != "hub" else {"open", "link", "fsync", "rename"}
    assert {report["event"].split()[0] for report in reports} >= calls


def test_a_folder_where_names_cannot_be_exchanged(inject: Inject) -> None:
    """The old folder has a scratch name for a moment, and gets its name back."""
    inject("folder", ("kill",), exchange=False)


@pytest.mark.usefixtures("target")
def test_saved_chats(inject: Inject) -> None:
    inject("chat", ("kill",))


@pytest.mark.usefixtures("floats")
def test_a_quantized_export(inject: Inject) -> None:
    inject("quantize", ("kill", "ENOSPC"), first=3, step=29)


@pytest.mark.slow
@pytest.mark.parametrize("exchange", (True, False))
@pytest.mark.parametrize("scenario", ("file", "folder", "first folder", "cache", "gguf", "hub", "hub on another disk"))
def test_writing_at_every_event(inject: Inject, scenario: str, exchange: bool) -> None:
    reports = inject(scenario, exchange=exchange)
    assert len(reports) >= 29 and {report["kind"] for report in reports} <= set(KINDS)


def test_fetching(inject: Inject) -> None:
    inject("hub fetch", ("kill", "ENOSPC"), first=3, step=37)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ("hub fetch", "first hub fetch"))
def test_fetching_at_every_event(inject: Inject, scenario: str) -> None:
    assert len(inject(scenario)) > 100


@pytest.mark.slow
@pytest.mark.usefixtures("target")
def test_saved_chats_at_every_event(inject: Inject) -> None:
    assert len(inject("chat")) > 80


@pytest.mark.slow
@pytest.mark.usefixtures("floats")
@pytest.mark.parametrize("exchange", (True, False))
@pytest.mark.parametrize("scenario", ("quantize", "export"))
def test_exports_at_every_event(inject: Inject, scenario: str, exchange: bool) -> None:
    assert len(inject(scenario, exchange=exchange)) > 300


@pytest.mark.slow
@pytest.mark.usefixtures("floats")
def test_an_export_with_calibration_text(inject: Inject) -> None:
    assert len(inject("calibrated quantize", ("kill", "full"))) > 100
