"""The scripts of benchmarks/ start from a checkout, by the paths that benchmarks/README.md names."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
SCRIPTS = sorted(set(re.findall(r"python (benchmarks/[\w/]+\.py)", README)))


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_start(script: str) -> None:
    run = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert f"python {script}" in run.stdout  # the help shows the command


def test_the_readme_names_every_script() -> None:
    own = {path.relative_to(ROOT).as_posix() for path in (ROOT / "benchmarks").rglob("*.py") if is_script(path)}
    assert set(SCRIPTS) == own


def is_script(path: Path) -> bool:
    """Whether it is run by users; workers are run by pard-bench."""
    return "__main__" in path.read_text(encoding="utf-8") and not path.name.endswith("_worker.py")
