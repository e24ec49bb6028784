"""The installed scripts, and what importing the package brings."""

from __future__ import annotations

import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pard_onnx
from pard_onnx import interrupts
from pard_onnx.__main__ import COMMANDS

ROOT = Path(__file__).parents[2]
HEAVY = {"numpy", "onnxruntime", "jinja2", "tokenizers", "rich", "torch", "transformers", "typing"}


def modules_after(statement: str) -> set[str]:
    script = f"import sys; before = set(sys.modules); {statement}; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["pard_onnx", "pard_onnx.entry_points"])
def test_nothing_heavy_is_imported_before_the_handlers_are_set(module: str) -> None:
    found = modules_after(
        "import importlib.util as u; "
        "s = u.spec_from_file_location('pard_onnx', 'api/__init__.py', submodule_search_locations=['api']); "
        "m = u.module_from_spec(s); sys.modules['pard_onnx'] = m; s.loader.exec_module(m); "
        f"__import__('{module}')"
    )
    assert found and not found & HEAVY


# With none of these, --help takes some 0.2 seconds; each of them takes from 0.03 seconds to several
UNNEEDED = {"rich", "jinja2", "huggingface_hub", "onnxruntime", "torch", "transformers", "onnx", "matplotlib", "ray"}
READ_CHECKPOINTS = ("export", "quantize", "models", "deploy", "adapt")  # by numpy


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_that_only_the_work_needs(command: str) -> None:
    script = (
        "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr));"
        f"sys.argv = ['pard', '{command}', '--help']; from pard_onnx.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: pard-{command} ")
    loaded = set(done.stderr.split())
    assert "pard_onnx.cli" in loaded
    assert not loaded & (UNNEEDED | {"pard_onnx.runtime.pair", "pard_onnx.runtime.model"})
    assert command in READ_CHECKPOINTS or "numpy" not in loaded


def test_load_is_imported_without_what_a_model_or_a_chat_brings() -> None:
    script = "import sys; from pard_onnx import load; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "numpy" in done.stdout.split() and not set(done.stdout.split()) & UNNEEDED


def test_every_public_name_can_be_imported() -> None:
    for name in pard_onnx.__all__:
        assert getattr(pard_onnx, name) is not None
    assert set(pard_onnx.__all__) <= set(dir(pard_onnx))
    with pytest.raises(AttributeError, match="has no attribute 'Pairs'"):
        _ = pard_onnx.Pairs  # type: ignore[attr-defined]


def test_every_script_sets_its_handlers_first() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    source = (ROOT / "api" / "entry_points.py").read_text(encoding="utf-8")
    assert len(scripts) == 11
    for script, target in scripts.items():
        name = script.removeprefix("pard-")
        assert target == f"pard_onnx.entry_points:{name}"
        assert f'def {name}() -> NoReturn:\n    run("{name}_command")' in source


def test_handlers_of_the_calling_program_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, lambda *_: None)
    own = signal.getsignal(signal.SIGINT)
    try:
        with interrupts.Interrupts() as found:
            assert signal.getsignal(signal.SIGINT) is own
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with interrupts.Interrupts():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert found.exit_code == 0


def test_the_handlers_are_put_back() -> None:
    numbers = [getattr(signal, name) for name in interrupts.ENDS if hasattr(signal, name)]
    before = [signal.getsignal(number) for number in numbers], sys.unraisablehook
    with interrupts.Interrupts():
        pass
    assert before == ([signal.getsignal(number) for number in numbers], sys.unraisablehook)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on memory")
@pytest.mark.parametrize("megabytes", [60, 75, 90, 105, 120, 135, 142, 150])
def test_no_memory_for_the_imports_is_one_line(megabytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or none, if it suffices. OpenBLAS ends the process in words of its own, or with a SIGINT."""
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    script = f"import resource, sys; resource.setrlimit(resource.RLIMIT_AS, ({megabytes} << 20, {megabytes} << 20));"
    script += "sys.argv[1:] = ['--help']; from pard_onnx.entry_points import generate; generate()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    if done.returncode == 0:
        assert megabytes > 100 and not done.stderr
        return
    assert done.returncode == 1
    assert done.stderr.startswith("error: not enough memory") and done.stderr.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="sends itself a signal as OpenBLAS does on POSIX systems")
@pytest.mark.parametrize(("threads", "code"), [(False, 1), (True, 130)])
def test_a_sigint_where_no_thread_can_be_started_is_no_ctrl_c(threads: bool, code: int) -> None:
    refuse = 'def refuse(*_): raise RuntimeError("can\'t start new thread")\n_thread.start_new_thread = refuse\n'
    script = (
        f"import _thread, os, signal\n{'' if threads else refuse}"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pard_onnx import entry_points\nos.kill(os.getpid(), signal.SIGINT)\nwhile True: pass"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert done.stderr.startswith("error: not enough memory for another thread") == (not threads)


def run_module(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pard_onnx", *words], capture_output=True, text=True, check=False)


def test_commands_without_their_scripts() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert {f"pard-{name}" for name in COMMANDS} == set(scripts)
    found = run_module("doctor", "--help")
    assert (found.returncode, found.stderr) == (0, "") and found.stdout.startswith("usage: pard-doctor")
    assert run_module("doctor", "--no-such-option").returncode == 2
    found = run_module("docter")
    assert found.returncode == 2 and found.stderr.startswith("error: argument COMMAND: invalid choice: 'docter'")
    assert found.stderr.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["models", "list"], *([command] for command in COMMANDS)])
def test_version(words: list[str]) -> None:
    found = run_module(*words, "--version")
    assert (found.returncode, found.stdout, found.stderr) == (0, f"pard-onnx {pard_onnx.__version__}\n", "")


def test_without_a_command_the_commands_are_named() -> None:
    found = run_module()
    assert (found.returncode, found.stdout) == (2, "") and found.stderr.count("\n") == 1
    assert found.stderr.startswith("error: the following arguments are required: COMMAND") and "--help" in found.stderr
    found = run_module("--help")
    assert found.returncode == 0 and all(command in found.stdout for command in COMMANDS)
