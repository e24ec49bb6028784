"""Property tests with new random examples. A failure prints an example: fix its cause, and add it as an `@example`."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_properties_hold_for_new_examples() -> None:
    command = ("-m", "pytest", "-q", "-m", "hypothesis and not webgpu", "--hypothesis-profile=explore")
    run = subprocess.run([sys.executable, *command], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    assert run.returncode == 0, run.stdout
