"""A small application, frozen by PyInstaller with this package's hook, and run where no Python is."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pard_onnx import load
from pard_onnx.models.manifest import File, Manifest
from pard_onnx.runtime import kernels

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SOURCES = (
    "api",
    "benchmarks",
    "export",
    "models",
    "quantize",
    "runtime",
    "serve",
    "pyproject.toml",
    "setup.py",
    "README.md",
)
PROMPT = "def read_lines(path):\n"
APP = """import dataclasses
import json
import sys

from pard_onnx import BadInput, load

print("started", flush=True)
try:
    with load(*sys.argv[1:3], threads=1) as pair:
        result = pair.generate(sys.argv[3], max_new_tokens=24)
        print(json.dumps([result.tokens, dataclasses.asdict(pair.info())]))
except BadInput as error:
    print(error)
"""
# Of the environment that the tests run in: what huggingface_hub and others would use if it is there
EXCLUDED = ("torch", "transformers", "onnx", "matplotlib", "PIL", "pandas", "scipy", "sympy", "tensorflow", "pytest")
BACKTRACKING = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The frozen application's program. PyInstaller does not follow editable installations: a copy is installed."""
    pytest.importorskip("PyInstaller")
    root = tmp_path_factory.mktemp("frozen")
    for name in (*SOURCES, "LICENSE"):
        source, copy = ROOT / name, root / "source" / name
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__", "_cpu.*"))
        else:
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(source, copy)
    python = [sys.executable, "-m"]
    installed = root / "packages"
    run([*python, "pip", "install", "-q", "--no-deps", "--target", str(installed), str(root / "source")])
    (root / "app.py").write_text(APP, encoding="utf-8")
    excluded = [option for name in EXCLUDED for option in ("--exclude-module", name)]
    freeze = [*python, "PyInstaller", "--log-level", "WARN", "--noconfirm", *excluded, "app.py"]
    run(freeze, cwd=root, env=os.environ | {"PYTHONPATH": str(installed)})
    return root / "dist" / "app" / ("app.exe" if os.name == "nt" else "app")


def run(command: list[str], **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


def start(application: Path, folder: Path, *arguments: str) -> list[str]:
    """What the application prints, started in this folder without an environment that would lead to Python."""
    kept = {name: os.environ[name] for name in ("SYSTEMROOT", "TEMP", "TMPDIR") if name in os.environ}
    environment = kept | {"PARD_ONNX_CACHE": str(folder / "cache"), "PATH": ""}
    return run([str(application), *arguments], cwd=folder, env=environment).splitlines()


def test_it_generates_what_the_library_does(
    application: Path, demo_folder: Callable[[str, str], Path], tmp_path: Path
) -> None:
    names = [str(demo_folder("demo-target", "int4")), str(demo_folder("demo-draft", "int8"))]
    with load(*names, threads=1) as pair:
        expected, info = pair.generate(PROMPT, max_new_tokens=24), pair.info()
    lines = start(application, tmp_path, *names, PROMPT)
    assert lines[0] == "started" and len(lines) == 2  # the helper process did not run the application again
    tokens, facts = json.loads(lines[1])
    assert tuple(tokens) == expected.tokens
    assert facts["kernel"] == info.kernel == (kernels.isa() or "onnxruntime")
    assert facts["versions"]["pard_onnx"] == info.versions.pard_onnx
    assert list((tmp_path / "cache" / "tokenizers").iterdir())


def test_strangers_tokenizers_are_tried_in_a_helper_process(
    application: Path, demo_folder: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """One whose expression backtracks for ever is refused, since a helper process has tried it on many texts."""
    folder = shutil.copytree(demo_folder("demo-target", "int4"), tmp_path / "stranger")
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"pre_tokenizer": BACKTRACKING}), "utf-8")
    manifest = Manifest.read(folder)
    replace(manifest, files=tuple(File.of(folder / one.name) for one in manifest.files)).write(folder)
    lines = start(application, tmp_path, str(folder), str(demo_folder("demo-draft", "int8")), PROMPT)
    assert lines[0] == "started" and len(lines) == 2
    assert lines[1].startswith(f"{file}: ") and lines[1].endswith("; take another tokenizer")
