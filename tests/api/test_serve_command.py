"""pard-serve: what is refused in one line, the line at the start, and signals."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("uvicorn")

import httpx

from pard_onnx.models import demo
from pard_onnx.models.extras import install_command
from pard_onnx.serve_command import DEMO, demo_source, main, size

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "--api-key"),
        (["--port", "70000"], "--port"),
        (["--host", "no such host", "--api-key", "x"], "there is no such address"),
        (["--draft", "x"], "--target"),
        (["one", "--target", "two"], "two targets"),
        (["one", "--models"], "leave out"),
        (["--models", "nothing"], "no exported target"),
        (["--memory", "much"], "12GiB"),
        (["--max-live", "0"], "max_live"),
        (["--cors", "example"], "--cors"),
        (["--target", "nothing/there"], "nothing/there"),
    ],
)
def test_bad_options_are_one_line(
    arguments: list[str], words: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("PARD_API_KEY", raising=False)
    try:
        code = main([*arguments, "--port", "0"] if "--port" not in arguments else arguments)
    except SystemExit as end:
        code = end.code  # type: ignore[assignment]
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error


def test_a_missing_extra_is_named(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*sys.modules]:
        if name.startswith("pard_onnx.serve."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "starlette", None)
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    assert main(["--target", "x"]) == 2
    assert f"starlette is not installed; run: {install_command('serve')}" in capsys.readouterr().err


def test_a_port_that_is_taken_is_one_line(capsys: Capture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--port", str(port)]) == 2
        assert "another program has this port" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value"), [("0", 0), ("1000", 1000), ("2K", 2048), ("1.5GiB", 3 << 29), ("12gb", 12 << 30)]
)
def test_sizes(text: str, value: int) -> None:
    assert size(text) == value


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_server_starts_and_ends(demo_folder: Callable[[str, str], Path], number: int, code: int) -> None:
    folders = demo_folder("demo-target", "int4"), demo_folder("demo-draft", "int8")
    command = [sys.executable, "-m", "pard_onnx.serve_command", "--port", "0", "--json", "--name", "mine"]
    command += ["--target", str(folders[0]), "--draft", str(folders[1])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        started = json.loads(process.stdout.readline())
        assert started["models"] == ["mine"]
        assert started["pid"] == process.pid
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1900, "stream": True}
        with httpx.stream("POST", started["url"] + "/v1/chat/completions", json=body, timeout=30) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(number)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert process.wait(20) == code
        assert process.stderr.read() == ""


def test_without_a_model_the_shipped_pair_is_served_without_an_export() -> None:
    source = demo_source()
    assert source.target == str(demo.EXPORTED_TARGET) and source.drafts == (str(demo.EXPORTED_DRAFT),)
    assert source.name == DEMO and source.must_fit
