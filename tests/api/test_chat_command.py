"""pard-chat: piped sessions, its commands, and a person at a terminal with Ctrl-C."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from terminal import CTRL_C, CTRL_D, Terminal

from pard_onnx import Chunk, Failure, Pair, load
from pard_onnx.chat_command import COMMANDS, main
from pard_onnx.chat_screen import Screen
from pard_onnx.models.manifest import File, Manifest
from pard_onnx.runtime.sessions.dynamic_shapes import FusedTarget

posix = pytest.mark.skipif(os.name == "nt", reason="a POSIX terminal")
MODULE = [sys.executable, "-m", "pard_onnx.chat_command"]
Say = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def options(write_artifact: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("pair for chats")
    target = write_artifact(root / "target", "target", kv_rows=320)
    draft = write_artifact(root / "draft", "draft", kv_rows=320)
    return ["--target", str(target), "--draft", str(draft), "--threads", "1", "--max-new-tokens", "9"]


@pytest.fixture(scope="module")
def long(write_artifact: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A reply of these takes longer than anyone waits."""
    target = write_artifact(tmp_path_factory.mktemp("long") / "target", "target", kv_rows=200_064)
    return ["--target", str(target), "--max-new-tokens", "190000", "--draft-length", "0", "--threads", "1"]


@pytest.fixture(scope="module")
def pair(options: list[str]) -> Pair:
    return load(options[1], options[3], threads=1)


@pytest.fixture
def say(options: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Say:
    """say(lines, *more options) -> exit code, stdout, stderr."""

    def run(lines: str, *more: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        code = main([*options, *more])
        return code, *capsys.readouterr()

    return run


def replies(pair: Pair, *texts: str, system: str | None = None) -> str:
    """What stdout has after these messages."""
    chat = pair.chat(system)
    return "".join(chat.send(text, max_new_tokens=9).text + "\n" for text in texts)


CUT = "[cut here: --max-new-tokens, or the capacity]\n"


def test_each_line_of_a_pipe_is_a_message(say: Say, pair: Pair) -> None:
    assert say("\ufeffthe fox\n\n  jumps \r\n") == (0, replies(pair, "the fox", "jumps"), CUT * 2)
    assert say("the fox", "--system", "be brief") == (0, replies(pair, "the fox", system="be brief"), CUT)
    assert say(" /etc is a folder\n") == (0, replies(pair, "/etc is a folder"), CUT)
    assert say("") == (0, "", "")


def test_template_arguments_are_of_every_turn(say: Say, pair: Pair, tmp_path: Path) -> None:
    option, file = ("--template-arg", "add_generation_prompt=false"), tmp_path / "saved"
    chat = pair.chat(template_arguments={"add_generation_prompt": False})
    one, two = (chat.send(text, max_new_tokens=9).text + "\n" for text in ("the fox", "jumps"))
    assert say("the fox\njumps\n", *option)[:2] == (0, one + two) != (0, replies(pair, "the fox", "jumps"))
    assert say(f"the fox\n/save {file}\n", *option)[:2] == (0, one)
    assert say("jumps\n", "--resume", str(file), *option)[:2] == (0, two)
    assert say("jumps\n", "--template-arg", "x")[2].endswith("--template-arg is written NAME=VALUE, not 'x'\n")


def test_the_program_reads_and_writes_pipes(options: list[str], pair: Pair) -> None:
    command = [*MODULE, *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin and process.stdout and process.stderr
        expected = replies(pair, "é", "jumps").encode().replace(b"\n", os.linesep.encode())
        process.stdin.write("é\n".encode())
        process.stdin.flush()
        first = replies(pair, "é").encode().replace(b"\n", os.linesep.encode())
        assert process.stdout.read(len(first)) == first  # before the next line is there
        out, err = process.communicate(b"jumps\n", timeout=120)
        assert (process.returncode, first + out, err.decode().replace("\r\n", "\n")) == (0, expected, CUT * 2)


def test_help_names_every_command(say: Say) -> None:
    code, out, err = say("/help\n")
    assert (code, out) == (0, "")
    assert all(f"/{name} " in err and command.text in err for name, command in COMMANDS.items())


def test_stats_are_of_the_last_reply(say: Say, pair: Pair) -> None:
    code, _, err = say("/stats\nthe fox\njumps\n/stats\n")
    lines = err.splitlines()
    assert (code, lines[0]) == (0, "no reply yet")
    chat = pair.chat()
    chat.send("the fox", max_new_tokens=9)
    stats = chat.send("jumps", max_new_tokens=9).stats
    assert lines[-3].startswith("9 tokens in ") and "the first after" in lines[-3]
    assert "accepted a round; rounds: " in lines[-2]
    assert lines[-1] == f"prompt: {stats.prompt_tokens} tokens, {stats.cached_tokens} of them cached"


def test_the_draft_length_is_changed_and_told(say: Say, pair: Pair) -> None:
    code, out, err = say("/k\n/k 0\nthe fox\n/stats\n/k auto\n")
    assert (code, out) == (0, replies(pair, "the fox"))
    assert err.startswith("draft length: auto\ndraft length: 0\n") and err.endswith("draft length: auto\n")
    assert "1.00 accepted a round; rounds: 8 none" in err
    assert "rounds: none" in say("the fox\n/stats\n", "--max-new-tokens", "1")[2]


def test_reset_keeps_the_system_message(say: Say, pair: Pair) -> None:
    for system in ("be brief", None):
        one = replies(pair, "the fox", system=system)
        more = ("--system", system) if system else ()
        assert say("the fox\n/reset\nthe fox\n", *more) == (0, one * 2, f"{CUT}the conversation begins anew\n{CUT}")


def test_save_and_resume(say: Say, pair: Pair, tmp_path: Path) -> None:
    file = tmp_path / "my chat"
    code, out, err = say(f"the fox\n/save {file}\n/quit\nnever read\n")
    assert (code, err) == (0, f"{CUT}saved to {file}; pard-chat --resume goes on with it\n")
    code, more, err = say("jumps\n/stats\n", "--resume", str(file))
    assert (code, out + more) == (0, replies(pair, "the fox", "jumps"))
    assert ", 0 of them cached" not in err


@pytest.mark.parametrize(
    ("line", "problem", "code"),
    [
        ("/foo", f"unknown command /foo; known are {', '.join(f'/{name}' for name in COMMANDS)}", 2),
        ("/", "unknown command /; known are /help", 2),
        ("/k many", "/k takes a number or auto, not many", 2),
        ("/k 33", "draft_length must be from 0 to 32, not 33", 2),
        ("/save", "/save takes the name of a file", 2),
        ("/save /no/such/folder", "/no/such/folder: cannot be written", 2),
        ("fox " * 300, "remove earlier messages, or export the target and the draft with a larger --context-length", 2),
    ],
)
def test_what_goes_wrong_is_one_line_and_the_chat_goes_on(
    say: Say, pair: Pair, line: str, problem: str, code: int
) -> None:
    found, out, err = say(f"the fox\n{line}\njumps\n")
    assert (found, out) == (code, replies(pair, "the fox", "jumps"))
    told = err.removeprefix(CUT).removesuffix(CUT)
    assert told.startswith("error: ") and told.count("\n") == 1 and problem in told


def test_a_failing_step_is_told_below_what_was_said(say: Say, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, step, steps = replies(pair, "the fox"), FusedTarget.step, []

    def failing(session: FusedTarget, ids: list[int], keep: int) -> object:
        steps.append(1)
        if len(steps) == 6:
            raise Failure("the device is gone")
        return step(session, ids, keep)

    monkeypatch.setattr(FusedTarget, "step", failing)
    code, out, err = say("the fox\nthe fox\n", "--draft-length", "0")
    assert (code, err) == (1, f"error: the device is gone\n{CUT}")
    begun = out.removesuffix(whole)
    assert len(begun) > 1 and begun.endswith("\n") and whole.startswith(begun[:-1])


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1, not 0"),
        (["--draft-length", "33", "--target", "not looked for"], "draft_length must be from 0 to 32, not 33"),
        (["--temperature", "-1"], "temperature must be at least 0"),
        (["--target", "nowhere at all"], "nowhere at all"),
        (["--resume", "nowhere at all"], "nowhere at all: no such file; name one that Chat.save or /save wrote"),
        (["--provider", "directml"], "on Windows: pip install "),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(say: Say, more: list[str], problem: str) -> None:
    code, out, err = say("hi\n", *more)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and problem in err


@pytest.mark.parametrize("more", [["--nonsense"], ["--draft-length", "x"], ["--system", "a", "--resume", "b"]])
def test_options_that_do_not_parse(options: list[str], more: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*options, *more])
    assert caught.value.code == 2


def test_input_that_is_not_utf8_is_said(options: list[str]) -> None:
    done = subprocess.run([*MODULE, *options], input=b"\xff\n", capture_output=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"error: stdin: not valid UTF-8: ") and done.stderr.count(b"\n") == 1


@posix
def test_ctrl_c_cancels_the_reply_and_keeps_the_conversation(long: list[str], tmp_path: Path) -> None:
    with Terminal([*MODULE, *long]) as terminal:
        assert "/help lists the commands" in terminal.expect("> ")
        for _ in range(2):
            terminal.type("the fox\n")
            terminal.expect("the fox\r\n.{50}")
            terminal.type(CTRL_C)
            terminal.expect(r"\[cancelled\].*> ")
        terminal.type("/stats\n")
        terminal.expect(r"\d+ tokens in .*prompt: \d+ tokens, [1-9]\d* of them cached.*> ")
        terminal.type(f"/save {tmp_path / 'chat'}\n")
        terminal.expect("saved to .*> ")
        assert terminal.ended(CTRL_D) == 0
    with load(long[1], threads=1) as pair:
        assert [message["role"] for message in pair.restore(tmp_path / "chat").messages] == ["user", "assistant"] * 2


@posix
@pytest.mark.parametrize(("keys", "code"), [(CTRL_C, 130), (CTRL_D, 0), ("/quit\n", 0)])
def test_ends_at_the_prompt(options: list[str], keys: str, code: int) -> None:
    with Terminal([*MODULE, *options]) as terminal:
        terminal.expect("> ")
        terminal.type("the fox\n")
        terminal.expect(r"\[cut here.*> ")
        assert terminal.ended(keys) == code
        assert "Traceback" not in terminal.seen


@posix
def test_the_drafts_tokens_are_coloured_on_request(options: list[str]) -> None:
    with Terminal([*MODULE, *options, "--draft-length", "4"]) as terminal:
        terminal.expect("> ")
        for keys, coloured in (("the fox\n", False), ("/accepted\n", False), ("the fox\n", True)):
            terminal.type(keys)
            assert ("\x1b[1;32m" in terminal.expect(r"(\[cut here|in colour).*> ")) == coloured


@posix
def test_the_prompt_is_not_among_redirected_replies(options: list[str], pair: Pair, tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out, Terminal([*MODULE, *options], out.fileno()) as terminal:
        terminal.expect("> ")
        terminal.type("the fox\n")
        terminal.expect(r"\[cut here.*> ")
        assert terminal.ended(CTRL_D) == 0
    assert (tmp_path / "out").read_text(encoding="utf-8", errors="surrogateescape") == replies(pair, "the fox")


@posix
def test_an_interrupted_pipe_ends(long: list[str]) -> None:
    with subprocess.Popen([*MODULE, *long], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        try:
            process.stdin.write(b"the fox\nthe fox\n")
            process.stdin.flush()
            assert process.stdout.read(10)
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
            assert process.returncode == 130
        finally:
            process.kill()


class Typed(io.StringIO):
    def isatty(self) -> bool:
        return True


@posix
def test_a_second_ctrl_c_during_a_reply_ends_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Typed())
    screen, acted = Screen(), []

    def press() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)  # where Python looks for signals

    with screen.interrupts(lambda: acted.append("nothing")):
        pass
    with pytest.raises(KeyboardInterrupt):
        press()
    with screen.interrupts(lambda: acted.append("reply")):
        press()
        assert acted == ["reply"]
        with pytest.raises(KeyboardInterrupt):
            press()
    with pytest.raises(KeyboardInterrupt):
        press()
    assert acted == ["reply"]


def test_each_part_of_a_reply_is_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    class Buffered(io.StringIO):
        def flush(self) -> None:
            written.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Buffered())
    screen = Screen()
    for text in ("the", " fox"):
        screen.show(Chunk(text, (1,), (True,), (text,)), mark=True)  # marks are for terminals
    assert written == ["the", "the fox"]


def test_a_chat_in_a_thread_leaves_signals_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Typed())
    before, passed = signal.getsignal(signal.SIGINT), []

    def elsewhere() -> None:
        with Screen().interrupts(print):
            passed.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert passed == [before] == [signal.getsignal(signal.SIGINT)]


def test_the_models_own_sampling_is_the_default_and_is_said(
    write_artifact: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = write_artifact(tmp_path / "target", "target", kv_rows=320)
    own = {"do_sample": True, "temperature": 9.0, "top_k": 20}
    (folder / "generation_config.json").write_text(json.dumps(own), encoding="utf-8")
    manifest = Manifest.read(folder)
    replace(manifest, files=(*manifest.files, File.of(folder / "generation_config.json"))).write(folder)
    target = ["--target", str(folder), "--max-new-tokens", "12", "--threads", "1"]
    with load(folder, threads=1) as alone:
        drawn = alone.chat().send("the fox", max_new_tokens=12, temperature=9.0, top_k=20, seed=5).text
        greedy = alone.chat().send("the fox", max_new_tokens=12).text
    for more, text, note in (
        (["--seed", "5"], drawn, "sampling: temperature 9.0, top_k 20, seed 5 (the model's own settings"),
        (["--sampling", "greedy"], greedy, ""),
        (["--temperature", "0"], greedy, "sampling: greedy (the model's own settings"),
    ):
        monkeypatch.setattr(sys, "stdin", io.StringIO("the fox\n"))
        assert main([*target, *more]) == 0
        captured = capsys.readouterr()
        assert captured.out.startswith(text) and note in captured.err and captured.err.count("\n") == 1 + bool(note)
