"""pard-generate: what it prints where, and its exit codes."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pard_onnx import load
from pard_onnx.generate_command import main, parser
from pard_onnx.generation_options import template_arguments
from pard_onnx.models.manifest import File, Manifest

TEXT = "the quick brown"
KEYS = [
    "text", "reasoning", "tool_calls", "tokens", "prompt_tokens", "new_tokens", "finish_reason", "accepted",
    "mean_accepted", "tokens_per_second", "time_to_first_token", "seconds", "sources", "ahead", "ahead_used", "exact",
    "widths", "provider", "draft_provider", "provider_reason", "kernel", "seed", "target_commit",
    "draft_commit",
]  # fmt: skip


@pytest.fixture
def options(pair_folders: tuple[Path, Path]) -> list[str]:
    return ["--target", str(pair_folders[0]), "--draft", str(pair_folders[1]), "--max-new-tokens", "12"]


@pytest.fixture(scope="module")
def expected(pair_folders: tuple[Path, Path]) -> str:
    return load(*pair_folders).generate(TEXT, max_new_tokens=12).text


def test_text_is_streamed_to_stdout(options: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*options, "--prompt", TEXT]) == 0
    assert capsys.readouterr() == (expected + "\n", "")


def test_the_target_is_named_once(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--prompt", TEXT], "name the target: MODEL, a name that pard-models list shows, or --target DIR"),
        (["other", *options, "--prompt", TEXT], "other and --target"),
        (["absent", "--prompt", TEXT], "'absent': neither an exported folder nor a hub id"),
    ):
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert words in err and (out, err.count("\n")) == ("", 1)


def test_a_folder_can_be_the_model(options: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*options[1:], "--prompt", TEXT]) == 0
    assert capsys.readouterr() == (expected + "\n", "")


def test_json_is_one_object(options: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*options, "--prompt", TEXT, "--json", "--draft-length", "5", "--no-exact"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert list(out) == KEYS
    assert list(out["seconds"]) == ["prefill", "draft", "verify", "other", "total"]
    assert (out["text"], out["new_tokens"], out["finish_reason"]) == (expected, 12, "length")
    assert (out["exact"], out["provider"]) == (False, "cpu")
    assert 1 + sum(out["accepted"]) == 12 == len(out["tokens"])


def test_log_probabilities(
    options: list[str], pair_folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*options, "--prompt", TEXT, "--logprobs", "2"]
    assert main([*asked, "--prompt-logprobs", "0", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert list(out) == [*KEYS, "logprobs", "prompt_logprobs"]
    result = load(*pair_folders).generate(TEXT, max_new_tokens=12, logprobs=2, prompt_logprobs=0)
    assert result.logprobs and result.prompt_logprobs
    assert out["logprobs"] == [one.openai() for one in result.logprobs]
    assert [one and one["logprob"] for one in out["prompt_logprobs"]] == [
        one and one.logprob for one in result.prompt_logprobs
    ]
    assert main(asked) == 2
    assert "--logprobs is a part of the JSON object; give --json too" in capsys.readouterr().err
    assert main([*asked[:-1], "21", "--json"]) == 2
    assert "--logprobs must be from 0 to 20, or None, not 21" in capsys.readouterr().err


def test_a_prompt_file_and_stdin(
    options: list[str],
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "prömpt.txt"
    file.write_text("\ufeff" + TEXT, encoding="utf-8")
    assert main([*options, "--prompt-file", str(file)]) == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO(TEXT))
    assert main(options) == 0
    assert capsys.readouterr().out == (expected + "\n") * 2


def test_chat_and_stop(options: list[str], pair_folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    whole = load(*pair_folders).generate(TEXT, chat=True, max_new_tokens=12).text
    assert main([*options, "--prompt", TEXT, "--chat", "--stop", whole[5:7], "--stop", "never"]) == 0
    assert capsys.readouterr().out == whole[: whole.index(whole[5:7])] + "\n"


TOOLS_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}\n"
    "{% if thinks %}{{ '<think>\n' }}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def thinker(write_artifact: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A target whose template has tools, and thinks."""
    folder = write_artifact(tmp_path_factory.mktemp("thinker") / "target", "target", kv_rows=1024 + 64, eos=(279,))
    manifest = Manifest.read(folder)
    template = TOOLS_TEMPLATE + "{# </think> #}"
    replace(manifest, spec=replace(manifest.spec, chat_template=template)).write(folder)
    return ["--target", str(folder), "--prompt", "hi", "--chat"]


def test_calls_are_printed(thinker: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("llguidance")
    file = tmp_path / "tools.json"
    file.write_text(json.dumps([TOOL]), encoding="utf-8")
    arguments = [*thinker, "--tools", str(file), "--tool-choice", "stop", "--max-reasoning-tokens", "0"]
    assert main([*arguments, "--template-arg", "thinks=true"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    call = json.loads(line)
    assert call["type"] == "function" and call["function"]["name"] == "stop"
    assert json.loads(call["function"]["arguments"]) == {}
    assert main([*arguments, "--template-arg", "thinks=true", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert (out["text"], out["tool_calls"], out["finish_reason"]) == ("", [call], "tool_calls")


def test_reasoning_goes_to_stderr(thinker: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*thinker, "--template-arg", "thinks=true", "--max-reasoning-tokens", "6", "--max-new-tokens", "40"]
    assert main([*arguments, "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["reasoning"] and out["text"] and "think" not in out["text"] + out["reasoning"]
    assert main(arguments) == 0
    assert capsys.readouterr() == (out["text"] + "\n", out["reasoning"] + "\n")
    assert main([*arguments, "--reasoning", "hide"]) == 0
    assert capsys.readouterr() == (out["text"] + "\n", "")


@pytest.mark.parametrize(
    ("content", "more", "problem"),
    [
        (None, [], "the file cannot be read"),
        ("[", [], "not JSON"),
        ("{}", [], "tools are a list"),
        ("[5]", [], "a tool is a Python function or a JSON object"),
        (json.dumps([TOOL]), ["--tool-choice", "other"], "tool_choice names 'other'"),
        (json.dumps([TOOL]), ["--max-reasoning-tokens", "-1"], "max_reasoning_tokens must be"),
    ],
)
def test_bad_tools(
    content: str | None, more: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the models load."""
    file = tmp_path / "tools.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    arguments = ["--target", "missing", "--prompt", "hi", "--chat", "--tools", str(file), *more]
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert problem in line


def test_the_models_own_sampling(
    write_artifact: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_artifact(tmp_path / "target", "target")
    arguments = ["--target", str(folder), "--prompt", TEXT, "--max-new-tokens", "12", "--seed", "3"]
    assert main([*arguments, "--sampling", "model"]) == 0
    greedy, said = capsys.readouterr()
    assert said == f"sampling: greedy ({folder} has no generation_config.json)\n"
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": 9.0}', encoding="utf-8")
    manifest = Manifest.read(folder)
    replace(manifest, files=(*manifest.files, File.of(folder / "generation_config.json"))).write(folder)
    assert main([*arguments, "--sampling", "model", "--top-k", "7"]) == 0
    drawn = load(folder).generate(TEXT, max_new_tokens=12, temperature=9.0, top_k=7, seed=3).text
    out, said = capsys.readouterr()
    assert out == drawn + "\n" != greedy and said.startswith("sampling: temperature 9.0, top_k 7, seed 3 (the model's")
    assert main(arguments) == 0
    assert capsys.readouterr() == (greedy, "")


def test_a_stop_token(options: list[str], pair_folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    tokens = load(*pair_folders).generate(TEXT, max_new_tokens=12).tokens
    stop = tokens[6]
    assert main([*options, "--prompt", TEXT, "--json", "--stop-token-id", str(stop), "--stop-token-id", "1"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert (out["tokens"], out["finish_reason"]) == (list(tokens[: tokens.index(stop)]), "stop")
    assert main([*options, "--prompt", TEXT, "--stop-token-id", "900"]) == 2
    assert "stop_token_ids: id 900 does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "arguments"),
    [
        (["add_generation_prompt=false"], {"add_generation_prompt": False}),
        (["add_generation_prompt=1", "add_generation_prompt="], {"add_generation_prompt": ""}),
        (["add_generation_prompt=[]", 'tools=[{"name": "find"}]'], {"add_generation_prompt": []}),
    ],
)
def test_template_arguments(
    options: list[str],
    pair_folders: tuple[Path, Path],
    values: list[str],
    arguments: dict[str, object],
    capsys: pytest.CaptureFixture[str],
) -> None:
    pair = load(*pair_folders)
    expected = pair.generate(TEXT, chat=True, max_new_tokens=12, template_arguments=arguments).text
    assert main([*options, "--prompt", TEXT, "--chat", *(f"--template-arg={value}" for value in values)]) == 0
    assert capsys.readouterr().out == expected + "\n"
    assert expected != pair.generate(TEXT, chat=True, max_new_tokens=12).text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a=false", False), ("a=5", 5), ("a=1 Jan 2030", "1 Jan 2030"), ('a="5"', "5"), ("a=b=c", "b=c"), ("a=", ""),
        ("a=NaN", "NaN"), ("a=null", None), ('a=[{"b": 1.5}]', [{"b": 1.5}]), ("a=[" + "[" * 100_000, "[" * 100_001),
    ],
)  # fmt: skip
def test_values_are_json_or_text(value: str, expected: object) -> None:
    found = template_arguments(parser().parse_args(["--target", "x", "--template-arg", value]))
    assert found == {"a": expected} and type(found["a"]) is type(expected)


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt-file", "no such file"], "no such file: the prompt cannot be read"),
        (["--prompt", "a", "--draft-length", "-1"], "draft_length must be from 0 to 32, not -1"),
        (["--prompt", "a", "--provider", "directml"], "on Windows: pip install "),
        (["--prompt", "a", "--threads", "0"], "threads must be from 1 to 512, not 0"),
        (["--prompt", "a", "--threads", "100000"], "threads must be from 1 to 512, not 100000"),
        (["--prompt", "a", "--chat", "--template-arg", "x"], "--template-arg is written NAME=VALUE, not 'x'"),
        (["--prompt", "a", "--chat", "--template-arg", "=x"], "--template-arg is written NAME=VALUE, not '=x'"),
        (["--prompt", "a", "--chat", "--template-arg", "tools=x"], "tools in template_arguments are a list of JSON"),
        (["--prompt", "a", "--template-arg", "a=x"], "--template-arg is for the chat template; give --chat too"),
        (["--prompt", "fox " * 200], "but the capacity is 128"),
        (["--prompt", "a", "--target", "nowhere at all"], "nowhere at all"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    options: list[str], more: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*options, *more]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and problem in err


def test_unknown_options_are_refused(options: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*options, "--prompt", "a", "--nonsense"])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (OSError("the disk is gone"), 1), (ZeroDivisionError("what nobody foresaw"), 1)],
)
def test_interruptions_and_failures(
    options: list[str],
    error: BaseException,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("pard_onnx.runtime.pair.load", fail)
    assert main([*options, "--prompt", "a"]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == (code == 1) and str(error) in err


def test_output_is_utf8_whatever_the_console_says(options: list[str], expected: str) -> None:
    """As on a Windows console: a code page that has none of these letters."""
    command = [sys.executable, "-m", "pard_onnx.generate_command", *options, "--prompt", TEXT]
    done = subprocess.run(command, capture_output=True, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("utf-8").replace("\r\n", "\n") == expected + "\n"


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell's way to close streams")
@pytest.mark.parametrize(
    ("closed", "more", "code", "problem"),
    [
        ("<&-", [], 2, "error: stdin: the prompt is empty\n"),
        (">&-", ["--prompt", TEXT], 0, ""),
        ("2>&-", ["--target", "nowhere at all", "--prompt", TEXT], 2, ""),
        (">&-", ["--target", "\udcff", "--prompt", TEXT], 2, "\\udcff"),
        ("| :", ["--prompt", TEXT], 0, ""),  # the shell's code is that of the pipe's end
    ],
)
def test_closed_streams(options: list[str], closed: str, more: list[str], code: int, problem: str) -> None:
    command = [sys.executable, "-m", "pard_onnx.generate_command", *options, *more]
    done = subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *command], capture_output=True)
    assert (done.returncode, done.stdout) == (code, b"")
    assert problem in done.stderr.decode() and done.stderr.count(b"\n") == bool(problem)
