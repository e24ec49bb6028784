"""Every program in examples/ runs, and does what it says."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pard_onnx import Pair, adapt_command, bench_command, export_command, load

EXAMPLES = Path(__file__).parents[2] / "examples"
ROWS = 512 + 64
TRIED = {"chat.py", "batch.py", "logits_processor.py", "own_drafter.py", "window.py"}
TRIED |= {"fastapi_sse.py", "extraction.py", "tools.py", "scoring.py", "callers.py"}  # in test_applications.py
TRIED |= {"adapt_smollm2.py"}


@pytest.fixture(scope="module")
def folders(write_artifact: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("long toy pair")
    target = write_artifact(root / "target", "target", kv_rows=ROWS)
    return str(target), str(write_artifact(root / "draft", "draft", rows=284, kv_rows=ROWS))


@pytest.fixture(scope="module")
def pair(folders: tuple[str, str]) -> Iterator[Pair]:
    with load(*folders, threads=1) as opened:
        yield opened


def run(name: str, *arguments: str, given: str = "") -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, input=given, capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


def example(name: str) -> ModuleType:
    spec = spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_examples_are_tried_and_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert names == TRIED
    assert all(f"`{name}" in listed for name in names)


def test_chat(folders: tuple[str, str], pair: Pair) -> None:
    printed = run("chat.py", *folders, given="fox\n\nthe lazy dog\n")
    with pair.chat("You are a helpful assistant.", overflow="drop-oldest") as chat:
        first, second = (chat.send(text, max_new_tokens=512) for text in ("fox", "the lazy dog"))
    assert printed == f"> {first.text}\n> > {second.text}\n> "


def test_own_drafter() -> None:
    printed = run("own_drafter.py")
    assert "the same text: True" in printed
    tokens, steps, plain = (int(word) for word in printed.split() if word.isdigit())
    assert tokens == plain == 60 and steps < 30


def test_logits_processor(folders: tuple[str, str]) -> None:
    printed = run("logits_processor.py", *folders)
    text, last = printed[: printed.rindex("the same without")], printed.splitlines()[-1]
    assert last == "the same without drafts: True"
    assert text.strip() and "e" not in text.lower()


def test_a_batch_goes_on_where_it_stopped(pair: Pair, tmp_path: Path) -> None:
    batch = example("batch")
    source, output, whole = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "whole.jsonl"))
    messages = [{"role": "user", "content": "dog"}]
    prompts: list[Any] = ["fox", "é ü", messages, "x " * 9999, "the lazy dog"]
    lines = [json.dumps({"id": n, "prompt": prompt}) for n, prompt in enumerate(prompts)]
    source.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    assert batch.run(pair, source, whole) == len(prompts)
    found = [json.loads(line) for line in whole.read_text(encoding="utf-8").splitlines()]
    assert [one["id"] for one in found] == list(range(len(prompts)))
    assert found[0]["text"] == pair.generate("fox", chat=True, max_new_tokens=256).text
    assert "the prompt has" in found[3]["error"]
    content = whole.read_bytes()
    for cut in (0, 5, content.index(b"\n") + 1, len(content) - 3):  # wherever it was interrupted
        output.write_bytes(content[:cut])
        batch.run(pair, source, output)
        assert output.read_bytes() == content
    assert batch.run(pair, source, output) == 0


def test_a_batch_by_command(folders: tuple[str, str], tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"id": "a", "prompt": "fox"}\n', encoding="utf-8")
    assert run("batch.py", *folders, str(source), str(tmp_path / "out.jsonl")) == "1 prompts answered\n"


def test_a_draft_for_smollm2_is_adapted_exported_and_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    adapt, parsed = example("adapt_smollm2"), []
    parsers = {"export": export_command.parser(), "adapt": adapt_command.parser(), "bench": bench_command.parser()}

    def command(name: str, *words: object) -> None:
        options = parsers[name].parse_args([str(word) for word in words])
        parsed.append((name, options))
        if name != "bench":
            options.output.mkdir()

    monkeypatch.setattr(adapt, "command", command)
    adapt.main("model.gguf", tmp_path, 3)
    assert [name for name, _ in parsed] == ["export", "adapt", "export", "bench"]
    (_, target), (_, draft), (_, exported), (_, bench) = parsed
    assert draft.exported == str(target.output) and exported.named_model == str(draft.output) and draft.shallow == 3
    assert (bench.target, bench.draft) == (str(target.output), [str(exported.output)])
    adapt.main("model.gguf", tmp_path, 3)  # what is there is not made again
    assert [name for name, _ in parsed[4:]] == ["bench"]
    learned, held_out = ({json.loads(line)["prompt"] for line in file.read_text().splitlines()} for file in (
        tmp_path / "prompts.jsonl", tmp_path / "held-out.jsonl"))  # fmt: skip
    assert len(learned) == adapt.LEARNED and len(held_out) == 330 and not learned & held_out


@pytest.fixture
def display(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A display: the one that is there, or Xvfb's, if that is installed."""
    program = shutil.which("Xvfb")
    if "DISPLAY" in os.environ or not program:
        yield
        return
    reading, writing = os.pipe()
    server = subprocess.Popen([program, "-displayfd", str(writing)], pass_fds=[writing], stderr=subprocess.DEVNULL)
    os.close(writing)
    with os.fdopen(reading) as file:
        monkeypatch.setenv("DISPLAY", f":{file.readline().strip()}")
        yield
    server.terminate()
    server.wait()


@pytest.fixture
def root(display: None) -> Iterator[Any]:
    """A window of tkinter's."""
    tkinter = pytest.importorskip("tkinter", reason="tkinter is not installed (apt install python3-tk)")
    try:
        opened = tkinter.Tk()
    except tkinter.TclError as error:
        pytest.skip(f"no display, and no Xvfb (apt install xvfb): {error}")
    yield opened
    with suppress(tkinter.TclError):  # the test has closed it
        opened.destroy()


def until(root: Any, wanted: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not wanted():
        assert time.monotonic() < end
        root.update()
        time.sleep(0.005)


def shown(window: Any) -> str:
    return str(window.text.get("1.0", "end"))


def test_the_window_streams_and_cancels(pair: Pair, root: Any) -> None:
    module = example("window")
    with pair.chat("be brief") as chat:
        stream = chat.stream
        slowly = {"stop_when": lambda *_: bool(time.sleep(0.01))}
        chat.stream = lambda text, **options: stream(text, **options, **slowly)  # type: ignore[method-assign]
        replies = module.Replies(chat)
        window = module.Window(root, replies)
        window.entry.insert(0, "fox")
        window.send_button.invoke()
        until(root, lambda: len(shown(window)) > 12)
        window.cancel_button.invoke()
        until(root, lambda: "[cancelled]" in shown(window))
        reply = chat.messages[-1]["content"]
        assert reply and reply in shown(window)
        assert str(window.cancel_button["state"]) == "disabled"
        window.entry.insert(0, "dog")
        window.send()
        window.close()  # while it streams
        assert not replies.running


def test_the_replies_of_the_window_without_a_display(pair: Pair) -> None:
    pytest.importorskip("tkinter", reason="tkinter is not installed (apt install python3-tk)")
    module = example("window")
    with pair.chat() as chat:
        stream = chat.stream
        slowly = {"stop_when": lambda *_: bool(time.sleep(0.01))}
        chat.stream = lambda text, **options: stream(text, **options, **slowly)  # type: ignore[method-assign]
        replies = module.Replies(chat)
        replies.start("fox")
        first = replies.events.get(timeout=30)
        replies.cancel()
        replies.wait()
        events = [first, *replies.events.queue]
        assert [kind for kind, _ in events[:-1]] == ["text"] * (len(events) - 1)
        assert events[-1] == ("end", "cancelled")
        assert "".join(text for kind, text in events if kind == "text") == chat.messages[-1]["content"]


@pytest.mark.skipif(os.name == "nt", reason="a terminal's Ctrl-C")
def test_ctrl_c_ends_a_reply_and_not_the_chat(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    module = example("chat")
    with pair.chat() as chat:
        stream_of = chat.stream

        def interrupted(*arguments: Any, **options: Any) -> Any:
            stream = stream_of(*arguments, **options)
            later = type(stream).__next__
            calls = iter(range(10**6))

            class Stream(type(stream)):  # type: ignore[misc]
                def __next__(self) -> Any:
                    if next(calls) == 2:
                        raise KeyboardInterrupt
                    return later(self)

            stream.__class__ = Stream
            return stream

        chat.stream = interrupted  # type: ignore[method-assign]
        module.answer(chat, "fox")
        text = capsys.readouterr().out
        assert text.strip() and chat.messages[-1]["content"] + "\n" == text
