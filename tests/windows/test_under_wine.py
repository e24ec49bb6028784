"""The package under Windows' Python, its kernels' DLL and ONNX Runtime's wheel for Windows, where Wine can run them.

    pytest -m slow tests/windows

PARD_ONNX_WINE names a folder that is prepared once and kept; otherwise everything is fetched and built for this run, in
minutes. Without Wine, or without a registry, the tests are skipped. docs/reliability.md says what they do not show.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pard_onnx.models import demo

FOLDER = Path(__file__).parent
sys.path.append(str(FOLDER))

from wine import Wine, missing  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
FUZZED = ("shapes", "operators")
# Unit tests without torch and onnxscript, whose wheels Wine 8 does not load, and without POSIX' own calls
PURE = ("tests/models/test_atomic.py", "tests/models/test_checks.py", "tests/models/test_records.py")
KERNELS = ("attention", "attention_operator", "attention_window", "hostile_operators", "matmul", "operator", "fuzz")


@pytest.fixture(scope="module")
def wine(tmp_path_factory: pytest.TempPathFactory) -> Wine:
    if problem := missing():
        pytest.skip(problem)
    made = Wine(Path(os.environ.get("PARD_ONNX_WINE") or tmp_path_factory.mktemp("wine")))
    try:
        made.prepare()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"cannot be prepared: {error}")
    return made


def passed(wine: Wine, *arguments: str) -> int:
    """How many tests pass. AssertionError with pytest's words if one fails."""
    done = wine.python("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, seconds=1500)
    assert done.returncode == 0, done.stdout[-8000:]
    found = re.search(r"(\d+) passed", done.stdout)
    return int(found[1]) if found else 0


def test_kernels(wine: Wine) -> None:
    assert passed(wine, *(f"tests/runtime/kernels/test_{name}.py" for name in KERNELS)) > 400


def test_pure_python(wine: Wine) -> None:
    assert passed(wine, *PURE) > 50


def test_graphs_and_texts_are_those_of_this_system(wine: Wine, tmp_path: Path) -> None:
    pair = demo.EXPORTED_TARGET.parent
    program = FOLDER / "same_results.py"
    subprocess.run([sys.executable, program, "write", tmp_path, pair], check=True)
    done = wine.python(program, "compare", tmp_path, pair)
    assert done.returncode == 0 and "results are the same" in done.stdout, done.stdout[-8000:]


@pytest.mark.parametrize("encoding", ["cp1252", "cp437", "ascii"])
def test_commands_print_in_any_console(wine: Wine, encoding: str) -> None:
    """Names that no such console has: the commands write UTF-8, whatever Python was told."""
    code = (
        f"import os, sys; os.environ['PYTHONIOENCODING'] = {encoding!r}; import subprocess\n"
        "done = subprocess.run([sys.executable, '-c', 'from pard_onnx.entry_points import generate; generate()',"
        " '--target', '汉字 é 🙂', '--prompt', 'x'], capture_output=True)\n"
        "print(done.returncode, ascii(done.stderr.decode('utf-8')))"
    )
    done = wine.python("-c", code)
    assert done.stdout.startswith("2 ") and "Traceback" not in done.stdout, done.stdout
    assert "\\u6c49\\u5b57 \\xe9 \\U0001f642" in done.stdout


def test_the_doctor_names_the_kernels(wine: Wine) -> None:
    done = wine.python("-c", "from pard_onnx.entry_points import doctor; doctor()")
    assert done.returncode == 0 and "Traceback" not in done.stdout, done.stdout
    assert re.search("avx|kernels", done.stdout), done.stdout


@pytest.mark.parametrize("program", FUZZED)
def test_fuzzed_kernels(wine: Wine, program: str) -> None:
    """The fuzzers of fuzz/, without sanitizers, which zig does not have for Windows."""
    built = wine.build_fuzzers()
    arguments = ["400"] if program == "shapes" else ["--seconds", "30", "fuzz/corpus"]
    done = wine.run(built / f"{program}.exe", *arguments)
    assert done.returncode == 0, done.stdout[-4000:]
