"""Long use of the shipped pair: memory, open files and threads stay what they are after a short time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "soak.py"
MIB = 2**20


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("work", "most"), [("generations", 8), ("chats", 8), ("loads", 16)])
def test_long_use_grows_nothing(work: str, most: int, demo_folder: Callable[[str, str], Path]) -> None:
    """most: MiB of resident memory that the runs after the first ones may add. The process has no other work, in
    whose freed memory a leak would hide."""
    folders = demo_folder("demo-target", "int4"), demo_folder("demo-draft", "int8")
    done = subprocess.run([sys.executable, SCRIPT, work, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout)
    print(work, before, after)
    assert after["resident"] - before["resident"] <= most * MIB, (before, after)
    assert after["files"] <= before["files"] and after["threads"] <= before["threads"], (before, after)
