"""Memory of exporting true shapes (slow; gigabytes of disk)."""

import sys
from pathlib import Path

import pytest

from pard_onnx.benchmarks.replicas.replica import main as replica

psutil = pytest.importorskip("psutil")


def peak_memory(command: list[str]) -> int:
    """The most resident bytes that the command had, sampled."""
    process = psutil.Popen(command)
    peak = 0
    while process.poll() is None:
        try:
            peak = max(peak, process.memory_info().rss)
            process.wait(0.05)
        except psutil.TimeoutExpired:
            pass
        except psutil.Error:  # gone between the two calls
            break
    assert process.wait() == 0
    return peak


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    ("name", "options", "limit"), (("Qwen2.5-1.5B", [], 2.5e9), ("Qwen2.5-7B", ["--no-verify"], 4e9))
)
def test_exporting_streams_the_weights(tmp_path: Path, name: str, options: list[str], limit: float) -> None:
    checkpoint = tmp_path / "checkpoint"
    assert replica(["--like", name, "--output", str(checkpoint)]) == 0
    export = [sys.executable, "-m", "pard_onnx.export_command", "--model", str(checkpoint), *options]
    assert peak_memory([*export, "--output", str(tmp_path / "out")]) < limit
