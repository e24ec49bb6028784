"""The programs in examples/ that applications are made of: an endpoint, extraction, tools, scores, several callers."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
from toy_artifacts import QWEN_LIKE

from pard_onnx import Pair, load

EXAMPLES = Path(__file__).parents[2] / "examples"
ROWS = 4096 + 64  # the descriptions of tools are long in tokens of a letter each
EOS = 279


@pytest.fixture(scope="module")
def folders(write_artifact: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A toy pair with a template that tells the model of tools."""
    root = tmp_path_factory.mktemp("toy pair with tools")
    options: dict[str, Any] = {"kv_rows": ROWS, "template": QWEN_LIKE, "eos": (EOS,)}
    target = write_artifact(root / "target", "target", **options)
    return str(target), str(write_artifact(root / "draft", "draft", rows=284, **options))


@pytest.fixture(scope="module")
def pair(folders: tuple[str, str]) -> Iterator[Pair]:
    with load(*folders, threads=1) as opened:
        yield opened


def example(name: str) -> ModuleType:
    spec = spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # where pydantic and dataclasses look up annotations
    spec.loader.exec_module(module)
    return module


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


@contextmanager
def served(app: Any) -> Iterator[str]:
    """The address of the application, served by uvicorn in a thread."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", ws="none", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


def until(wanted: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not wanted():
        assert time.monotonic() < end
        time.sleep(0.02)


def endpoint_packages() -> Any:
    """httpx; skips the test where what the endpoint needs is missing."""
    for name in ("fastapi", "uvicorn", "httpx"):
        found = pytest.importorskip(name, reason=f"{name} is not installed (pip install fastapi uvicorn httpx)")
    return found


def test_the_endpoint(pair: Pair) -> None:
    httpx = endpoint_packages()
    app = example("fastapi_sse").make_app(pair)
    with served(app) as address, httpx.Client(base_url=address, timeout=60) as client:
        for prompt in ("the fox", [{"role": "user", "content": "é ü"}]):
            with client.stream("POST", "/generate", json={"prompt": prompt, "max_new_tokens": 40}) as response:
                assert response.headers["content-type"].startswith("text/event-stream")
                lines = [line for line in response.iter_lines() if line]
            events = [json.loads(line.removeprefix("data: ")) for line in lines]
            expected = pair.generate(prompt, max_new_tokens=40)  # type: ignore[arg-type]
            assert "".join(one["text"] for one in events[:-1]) == expected.text
            assert events[-1] == {"finish_reason": expected.finish_reason, "tokens": len(expected.tokens)}
        for body, status in (({"prompt": ""}, 400), ({"prompt": "x" * 9999}, 400), ({}, 422)):
            refused = client.post("/generate", json=body)
            assert refused.status_code == status
            assert status != 400 or "the prompt" in refused.json()["detail"]


def test_a_client_of_the_endpoint_that_goes_away(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    httpx = endpoint_packages()
    counted: list[int] = []

    def slowly(_: str, tokens: Sequence[int]) -> bool:
        counted.append(len(tokens))
        time.sleep(0.02)
        return False

    stream = pair.stream
    monkeypatch.setattr(pair, "stream", lambda *prompt, **options: stream(*prompt, **options, stop_when=slowly))
    with served(example("fastapi_sse").make_app(pair)) as address:
        body = {"prompt": "the fox", "max_new_tokens": 4000}
        with httpx.stream("POST", f"{address}/generate", json=body, timeout=60) as response:
            next(response.iter_lines())
            assert not pair.engine._turns.idle
        until(lambda: pair.engine._turns.idle)
    assert 0 < len(counted) < 1000


def test_extraction(pair: Pair, folders: tuple[str, str], tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    extraction = example("extraction")
    lines = ["3 kg flour", "", "  urgent: 12 pieces of soap "]
    found = list(extraction.extract(pair, lines))
    assert [line for line, _ in found] == ["3 kg flour", "urgent: 12 pieces of soap"]
    for _, order in found:
        assert order is not None
        facts = {name: getattr(order, name) for name in ("article", "amount", "unit", "urgent")}
        jsonschema.validate(facts, json.loads(json.dumps(extraction.SCHEMA)))
    right = extraction.Order("Flour", 3, "kg", False)
    assert list(right.problems("3 kg flour")) == []
    assert list(right.problems("soap")) == ["3 is not in the text", "'Flour' is not in the text"]
    path = tmp_path / "orders.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    printed = run("extraction.py", *folders, str(path))
    assert printed.count("Order(") == 2 and "cut short" not in printed


def test_tools(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    """With a model of random weights, which is made to call in each round."""
    pytest.importorskip("llguidance")
    tools = example("tools")
    forced = {"tool_choice": "required", "parallel_tool_calls": False, "max_reasoning_tokens": 3}
    for rounds in (1, 3):
        result = tools.ask(pair, "Do I need an umbrella?", rounds=rounds, **forced)
        printed = capsys.readouterr().out.splitlines()
        assert len(printed) == rounds and not result.tool_calls
        assert all("error" not in line and " -> " in line for line in printed)
    result = tools.ask(pair, "Hi!", max_new_tokens=20)  # no call at all
    assert not result.tool_calls and capsys.readouterr().out == ""
    cut = tools.ask(pair, "Hi!", **forced | {"max_new_tokens": 30, "max_reasoning_tokens": 0})
    assert cut.finish_reason == "length" and capsys.readouterr().out == ""


def test_calls_that_fail_are_told_to_the_model() -> None:
    tools = example("tools")
    from pard_onnx import ToolCall

    for name, arguments, content in (
        ("get_weather", '{"city": "Ulm"}', '"rain"'),
        ("list_cities", "{}", '["Ulm", "Köln"]'),
        ("unknown", "{}", "error: KeyError"),
        ("get_weather", '{"town": 1}', "error: TypeError"),
        ("get_weather", '{"city": ', "error: JSONDecodeError"),
    ):
        message = tools.answer_of(ToolCall("call_1", name, arguments))
        assert message["role"] == "tool" and message["tool_call_id"] == "call_1" and message["name"] == name
        assert message["content"].startswith(content)


def test_scoring(pair: Pair, folders: tuple[str, str]) -> None:
    scoring = example("scoring")
    ranked = scoring.ranked(pair, "the quick", [" brown", " fox jumps", "é"])
    assert sorted(answer for answer, _ in ranked) == sorted([" brown", " fox jumps", "é"])
    assert [each for _, each in ranked] == sorted((each for _, each in ranked), reverse=True)
    score = pair.score("the quick", " fox jumps")
    assert dict(ranked)[" fox jumps"] == score.logprob / len(score.tokens)
    text = "the lazy dog"
    whole = pair.score(pair.tokenize(text)[:1], pair.tokenize(text)[1:])
    assert scoring.perplexity(pair, text) == pytest.approx(math.exp(-whole.logprob / len(whole.tokens)))
    lines = run("scoring.py", *folders).splitlines()
    assert len([line for line in lines if line[:8].strip().startswith("-")]) >= 3
    assert any(line.startswith("perplexity ") for line in lines)
    assert scoring.doubtful(pair, "fox", below=1.1) and not scoring.doubtful(pair, "fox", below=0)


def test_callers(pair: Pair, folders: tuple[str, str]) -> None:
    callers = example("callers")
    expected = [result.tokens for result in callers.one_by_one(pair)]
    assert [result.tokens for result in callers.in_threads(pair)] == expected
    assert [result.tokens for result in asyncio.run(callers.in_tasks(pair))] == expected
    assert run("callers.py", *folders).splitlines()[-1] == "the same texts: True"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "last"), [("callers.py", "the same texts: True"), ("scoring.py", "")])
def test_with_the_shipped_pair(demo_folder: Callable[[str, str], Path], name: str, last: str) -> None:
    printed = run(name, str(demo_folder("demo-target", "int4")), str(demo_folder("demo-draft", "int8"))).splitlines()
    assert last in printed[-1]
    if name == "scoring.py":
        assert printed[0].endswith("x))")
