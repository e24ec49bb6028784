"""Signals at every moment of every command: the exit code is 128 plus the signal, and nothing is written about it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from signalled import signalled

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are sent as POSIX systems do")

SHORT = ["--max-new-tokens", "32"]


@dataclass(frozen=True)
class Command:
    """A short run of a command."""

    arguments: Callable[[Path, Path, Path], Sequence[str]]  # from target, draft and an empty folder
    typed: str = ""
    dense: float = 1.5  # seconds from its start that are tried closely
    step: float = 0.02  # seconds between two signals there; further on, 20 times as long


COMMANDS = {
    "generate": Command(
        lambda target, draft, _: ["--target", str(target), "--draft", str(draft), "--prompt", "def f", *SHORT]
    ),
    "chat": Command(lambda target, draft, _: ["--target", str(target), "--draft", str(draft), *SHORT], "def f\n", 1.2),
    "doctor": Command(lambda target, draft, _: [str(target), str(draft)]),
    "bench": Command(lambda target, draft, _: ["--pair", str(target), str(draft), "--limit", "2", *SHORT]),
    "demo": Command(lambda target, draft, folder: ["--output", str(folder), *SHORT], step=0.05),
    "export": Command(
        lambda target, draft, folder: ["--model", "demo-draft", "--precision", "int8", "--output", str(folder / "out")],
        step=0.05,
    ),
    "quantize": Command(
        lambda target, draft, folder: ["demo-draft", "--recipe", "int4-rtn", "--output", str(folder / "out")], step=0.05
    ),
}


@pytest.fixture(scope="module")
def folders(demo_folder: Callable[[str, str], Path]) -> tuple[Path, Path]:
    return demo_folder("demo-target", "int4"), demo_folder("demo-draft", "int8")


def moments(command: Command) -> Sequence[float]:
    close = [command.step * i for i in range(round(command.dense / command.step))]
    return [*close, *(command.dense + 20 * command.step * i for i in range(60))]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("again", [None, 0.004], ids=["once", "twice"])
@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_at_every_moment(name: str, again: float | None, folders: tuple[Path, Path], tmp_path: Path) -> None:
    """again: a second Ctrl-C comes so many seconds later, while the command cleans up."""
    command = COMMANDS[name]
    wrong, tried = [], 0
    for seconds in moments(command):
        if again is not None and round(seconds / command.step) % 3:
            continue
        arguments = command.arguments(*folders, tmp_path)
        found = signalled(name, arguments, seconds, again=again, typed=command.typed)
        if found.late:
            break
        tried += 1
        if found.code != 130 or not found.quiet:
            wrong.append((round(seconds, 3), found.code, found.stderr[-500:]))
        assert not any(path.name.startswith(".pard") for path in tmp_path.iterdir())
    assert tried >= 5
    assert not wrong, f"{len(wrong)} of {tried}: {wrong[:3]}"


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4])
def test_ctrl_c_in_the_first_moments(seconds: float, folders: tuple[Path, Path]) -> None:
    found = signalled("generate", COMMANDS["generate"].arguments(*folders, Path()), seconds)
    assert found.late or (found.code == 130 and found.quiet), found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.5])
def test_other_signals_end_a_command_quietly(number: int, seconds: float, folders: tuple[Path, Path]) -> None:
    found = signalled("chat", COMMANDS["chat"].arguments(*folders, Path()), seconds, number=number)
    assert found.code == 128 + number and found.quiet, found


def test_an_interrupt_inside_an_import_waits_for_its_end(tmp_path: Path) -> None:
    """C extensions turn an exception in their initialization into an ImportError, or print it."""
    (tmp_path / "slow_extension.py").write_text(
        "import time\ntry: time.sleep(0.5)\nexcept BaseException as error: raise ImportError('lost') from error\n"
    )
    script = (
        "import sys, signal, os; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from pard_onnx.cli import exit_code\n"
        "def work():\n"
        "    import threading, time\n"
        "    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "    import slow_extension\n"
        "    print('imported', flush=True)\n"
        "    time.sleep(20)\n"
        "sys.exit(exit_code(work))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) in [(130, "imported\n", ""), (130, "", "")]


@pytest.mark.parametrize(
    "work",
    [
        "    class Thing:\n"
        "        def __del__(self): os.kill(os.getpid(), signal.SIGINT); time.sleep(0.1)\n"
        "    Thing()\n",
        "    try: os.kill(os.getpid(), signal.SIGINT); time.sleep(5)\n"
        "    except BaseException as error: raise SystemError('returned a result with an exception set') from error\n",
        "    try: os.kill(os.getpid(), signal.SIGINT); time.sleep(5)\n"
        "    finally: os.kill(os.getpid(), signal.SIGINT); time.sleep(0.1); print('clean', flush=True)\n",
    ],
    ids=["destructor", "other error", "clean-up"],
)
def test_an_interrupt_that_libraries_hide_ends_the_command(work: str) -> None:
    script = (
        "import sys, signal, os, time; signal.signal(signal.SIGINT, signal.default_int_handler);"
        f"from pard_onnx.cli import exit_code\ndef work():\n{work}    time.sleep(20)\nsys.exit(exit_code(work))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=15)
    assert (done.returncode, done.stderr) == (130, "")
    assert done.stdout == ("clean\n" if "finally" in work else "")


@pytest.mark.parametrize("head", [0, 1])
@pytest.mark.parametrize("merged", [False, True], ids=["stdout", "stderr too"])
def test_a_closed_pipe_ends_a_command_quietly(head: int, merged: bool, folders: tuple[Path, Path]) -> None:
    target, draft = folders
    process = subprocess.Popen(
        [sys.executable, "-c", "from pard_onnx.entry_points import doctor; doctor()", str(target), str(draft)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if merged else subprocess.PIPE,
    )
    assert process.stdout
    process.stdout.read(head)
    process.stdout.close()
    errors = ""
    if process.stderr:
        with process.stderr as stream:
            errors = stream.read().decode()
    assert process.wait(60) in (0, 1) and not errors
