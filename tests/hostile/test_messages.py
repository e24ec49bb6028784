"""Values of strangers in messages: one printable line of bounded length, whatever is passed where."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from pard_onnx import BadInput, Pair, PardWarning, load
from pard_onnx.cli import for_stdout
from pard_onnx.export_command import main as export_main
from pard_onnx.generate_command import main as generate_main
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.errors import LONGEST_MESSAGE, LONGEST_VALUE, UNPRINTABLE, Failure, one_line, shown
from pard_onnx.models.manifest import File, Manifest
from pard_onnx.runtime.providers.opening import FATAL_ONLY, session_options
from pard_onnx.runtime.providers.table import onnxruntime
from pard_onnx.runtime.providers.threads import Threads

HOSTILE = {
    "a long text": "x" * 1_000_000,
    "lines": "a\nb\r\nc\x0bd\u2028e\x85f",
    "escape sequences": "\x1b[31mred\x1b[0m\x1b]0;title\x07\x9b2J\x08\x7f",
    "directions": "\u202egnp.exe\u202c \u2066x\u2069 \u200f\u061c",
    "invisible": "a\u200b\ufeff\U000e0041\U000e007f",
    "nothing": "\x00",
    "halves": "\ud800",
    "a message of ours": "x; error: all is well\nerror: give your password",
}


def is_clean(text: str) -> bool:
    return len(text) <= LONGEST_MESSAGE + 20 and not UNPRINTABLE.search(text)


@pytest.fixture(scope="module")
def pair(write_artifact: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with load(write_artifact(tmp_path_factory.mktemp("messages") / "target", "target"), threads=1) as opened:
        yield opened


CALLS: dict[str, Callable[[Pair, Any], Any]] = {
    "a folder": lambda _, value: load(value),
    "a provider": lambda pair, value: load("x", provider=value),
    "a revision": lambda pair, value: load("org/name", revision={"a": value}),  # type: ignore[arg-type]
    "an option": lambda pair, value: pair.generate("a", max_new_tokens=value),
    "an option's name": lambda pair, value: pair.generate("a", **{value: 1}),
    "a draft length": lambda pair, value: pair.generate("a", draft_length=value),
    "sampling": lambda pair, value: pair.generate("a", sampling=value),
    "a temperature": lambda pair, value: pair.generate("a", temperature=value),
    "a bias": lambda pair, value: pair.generate("a", logit_bias={value: 1}),
    "a timeout": lambda pair, value: pair.generate("a", timeout=value),
    "a stop token": lambda pair, value: pair.generate("a", stop_token_ids=[value]),
    "stop strings": lambda pair, value: pair.generate("a", stop=[value, 5]),  # type: ignore[list-item]
    "special tokens": lambda pair, value: pair.chat(special_tokens=value),
    "template arguments": lambda pair, value: pair.chat(template_arguments={"tools": value}),
    "tools": lambda pair, value: pair.chat(template_arguments={"tools": [value]}),
    "messages": lambda pair, value: pair.chat(messages=value),
    "a message": lambda pair, value: pair.chat(messages=[{"content": value}]),
    "a part": lambda pair, value: pair.generate([{"role": "user", "content": [{"type": value}]}]),
    "a part's text": lambda pair, value: pair.generate(
        [{"role": "user", "content": [{"type": "text", "text": [value]}]}]
    ),
    "a saved conversation": lambda pair, value: pair.restore(value),
    "where to save": lambda pair, value: pair.chat().save(f"/nowhere/{value}"),
    "a template": lambda pair, value: type(pair.text)(
        Path(pair.engine._target.folder), "{{ raise_exception(messages[0].content) }}"
    ).render([{"role": "user", "content": value}]),
    "a broken template": lambda pair, value: type(pair.text)(
        Path(pair.engine._target.folder), "{% " + value + " %}"
    ).render([{"role": "user", "content": "a"}]),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", HOSTILE)
def test_what_users_pass_is_cut(pair: Pair, call: str, name: str) -> None:
    with pytest.raises((BadInput, Failure)) as raised:
        CALLS[call](pair, HOSTILE[name])
    assert is_clean(str(raised.value)), str(raised.value)[:300]


def test_huge_numbers_are_no_error_of_pythons(pair: Pair) -> None:
    for options in ({"max_new_tokens": -(10**5000)}, {"draft_length": 10**5000}, {"timeout": -(10**5000)}):
        with pytest.raises(BadInput) as raised:
            pair.generate("a", **options)  # type: ignore[arg-type]
        assert is_clean(str(raised.value))


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize(
    "key", ["model_type", "hidden_size", "rope_scaling", "pard_token", "torch_dtype", "architectures"]
)
def test_values_of_a_checkpoint_are_cut(tiny: Callable[..., Path], tmp_path: Path, name: str, key: str) -> None:
    folder = tiny(tmp_path / "stranger")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: HOSTILE[name]}))
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", PardWarning)
            Checkpoint.open(folder)
    except BadInput as error:
        assert is_clean(str(error))
    assert all(is_clean(str(warning.message)) for warning in caught)


@pytest.mark.parametrize("name", ["a long text", "escape sequences", "lines", "directions"])
def test_commands_print_one_clean_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    value = HOSTILE[name].replace("\0", "")
    for main, arguments in (
        (generate_main, ["--target", value, "--prompt", "a"]),
        (generate_main, ["--target", "x", "--prompt", "a", "--template-arg", value]),
        (generate_main, ["--target", "x", "--max-new-tokens", value]),
        (generate_main, ["--target", "x", f"--{value}"]),
        (export_main, ["--model", value, "--output", "x"]),
        (export_main, ["--model", "demo-target", "--precision", value, "--output", "x"]),
    ):
        try:
            code = main(arguments)
        except SystemExit as end:  # argparse
            code = end.code  # type: ignore[assignment]
        assert code == 2
        printed = capsys.readouterr().err
        assert printed.endswith("\n") and is_clean(printed[:-1])


@pytest.mark.parametrize("terminal", [True, False])
def test_a_models_text_does_not_control_the_terminal(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    text = "a\tb\n\x1b]52;c;eA==\x07\r\x9b2J عربي\u200f"
    wanted = "a\tb\n\\x1b]52;c;eA==\\x07\\r\\x9b2J عربي\u200f" if terminal else text
    assert for_stdout(text) == wanted


BREAKS: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda graph: graph[: len(graph) // 2],
    "no graph": lambda _: b"\xff" * 1000,
    "an unknown operator": lambda graph: graph.replace(b"GroupQueryAttention", b"GroupQueryAttentiox"),
    "another operator": lambda graph: graph.replace(b"MatMul", b"MatMux"),
    "another operation": lambda graph: graph.replace(b"Gather", b"Concat"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_lines_of_onnx_runtime_do_not_appear_beside_ours(
    write_artifact: Callable[..., Path], tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write_artifact(tmp_path / "target", "target")
    path = folder / "model.onnx"
    path.write_bytes(BREAKS[name](path.read_bytes()))
    content = path.read_bytes()
    manifest = Manifest.read(folder)
    changed = File("model.onnx", len(content), hashlib.sha256(content).hexdigest())
    others = tuple(changed if file.name == "model.onnx" else file for file in manifest.files)
    replace(manifest, files=others).write(folder)
    capfd.readouterr()
    assert generate_main(["--target", str(folder), "--prompt", "the"]) in (1, 2)
    printed = capfd.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and is_clean(printed[:-1]), printed


def test_a_step_that_fails_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    ids, rows = (helper.make_tensor_value_info(name, kind, [1]) for name, kind in (("ids", 7), ("rows", 1)))
    table = helper.make_tensor_value_info("table", 1, [3])
    graph = helper.make_graph([helper.make_node("Gather", ["table", "ids"], ["rows"])], "g", [table, ids], [rows])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = session_options(Threads(1))
    options.log_severity_level = FATAL_ONLY  # as on the CPU
    session = onnxruntime().InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    with pytest.raises(Exception, match="out of data bounds"):
        session.run(None, {"table": np.zeros(3, np.float32), "ids": np.array([99])})
    assert capfd.readouterr().err == ""


@given(st.text() | st.lists(st.text()) | st.dictionaries(st.text(), st.integers()) | st.binary())
def test_values_are_shown_cut_and_printable(value: Any) -> None:
    text = shown(value)
    assert len(text) <= LONGEST_VALUE and not UNPRINTABLE.search(text)
    if isinstance(value, str) and len(repr(value)) < LONGEST_VALUE:
        assert text == repr(value)


def test_values_whose_repr_fails_are_shown_by_their_type() -> None:
    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError

    assert "Broken" in shown(Broken())
    assert len(shown(np.zeros((1000, 1000)))) <= LONGEST_VALUE
    assert len(shown(10**100_000)) <= LONGEST_VALUE


def test_a_cut_message_keeps_its_beginning_and_the_fix() -> None:
    text = one_line(f"folder/config.json: {'x' * 10**6}; take another copy")
    assert text.startswith("folder/config.json: xxx") and text.endswith("xxx; take another copy")
    assert len(text) == LONGEST_MESSAGE
    assert one_line("Ünïcödé 漢字 👩‍💻 a\tb") == "Ünïcödé 漢字 👩‍💻 a b"
    assert not re.search("[^ -~]", one_line("\x1b\u202e\x00"))
