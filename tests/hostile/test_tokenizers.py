"""Tokenizers of strangers: what panics, hangs or explodes in the tokenizers library is one line, soon."""

from __future__ import annotations

import base64
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pard_onnx.models import demo, helper_process
from pard_onnx.models.cache_folder import cache_folder
from pard_onnx.models.checkpoints import tokenizer as guarded
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.checkpoints.tokenizer_check import probe_texts
from pard_onnx.models.checkpoints.vocabulary import load_tokenizer
from pard_onnx.models.errors import BadArtifact, BadCheckpoint, BadInput
from pard_onnx.models.helper_process import HelperStopped, NoHelper, is_interpreter, run_helper
from pard_onnx.runtime.text.tokenizer import Text

SLOWEST = 15.0  # seconds; the deadline of a small file is 6
PLAIN = json.loads((demo.TARGET / "tokenizer.json").read_text(encoding="utf-8"))


def split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def replace(content: str, **pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def chain(kind: str, *items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", kind: list(items)}


def charsmap(text: bytes) -> str:
    return base64.b64encode((8).to_bytes(4, "little") + bytes(8) + text + b"\0").decode()


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
SPECIAL = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {},
}
HOSTILE: dict[str, dict[str, Any]] = {
    "a backtracking expression": {"pre_tokenizer": split("(a+)+$")},
    "another one": {"pre_tokenizer": split(r"(?:\w|\w\w|_)*\1?;")},
    "one for every text": {"pre_tokenizer": split("(.|..|...)*#")},
    "one in a normalizer": {"normalizer": replace("x", Regex="(a|a)*[!]{2}")},
    "a replacement of nothing": {"normalizer": replace("xx", String="")},
    "an expression of nothing": {"normalizer": replace("xx", Regex="")},
    "doubled thirty times": {"normalizer": chain("normalizers", *[replace("aa", String="a")] * 30)},
    "ten times nine times": {"normalizer": chain("normalizers", *[replace("a" * 10, Regex=".")] * 9)},
    "look-aheads that double": {"normalizer": chain("normalizers", *[replace("a", Regex="(?=a)")] * 30)},
    "sequences in sequences": {
        "normalizer": chain("normalizers", *[chain("normalizers", *[replace("ee", String="e")] * 6)] * 6)
    },
    "bytes of bytes": {"pre_tokenizer": chain("pretokenizers", *[BYTES] * 40)},
    "half in each": {
        "normalizer": chain("normalizers", *[replace("ee", String="e")] * 9),
        "pre_tokenizer": chain("pretokenizers", *[BYTES] * 9),
    },
    "a table of long texts": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap(b"e" * 5000)}},
    "a broken table": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "an unknown special token": {"post_processor": SPECIAL},
    "a decoder that doubles": {"decoder": chain("decoders", *[replace("aa", String="a")] * 40)},
    "a decoder of expressions": {"decoder": chain("decoders", *[replace("a" * 10, Regex=".")] * 9)},
    "a decoder of suffixes": {"decoder": chain("decoders", *[{"type": "BPEDecoder", "suffix": ""}] * 40)},
    "a decoder that strips": {"decoder": {"type": "Strip", "content": "a", "start": 2**60, "stop": 2**60}},
    "repetitions of repetitions": {"pre_tokenizer": split("((((a{1,999}){1,999}){1,999}){1,999})b")},
}


def folder_with(root: Path, changes: dict[str, Any]) -> Path:
    """A copy of the shipped target with a changed tokenizer."""
    shutil.copytree(demo.TARGET, root)
    (root / "tokenizer.json").write_text(json.dumps(PLAIN | changes), encoding="utf-8")
    return root


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tokenizers_are_refused_before_they_are_used(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = folder_with(tmp_path / "stranger", HOSTILE[name])
    start = time.perf_counter()
    with pytest.raises(BadCheckpoint, match=r"stranger.tokenizer\.json") as raised:
        Checkpoint.open(folder)
    assert time.perf_counter() - start < SLOWEST
    assert "\n" not in str(raised.value)
    assert capfd.readouterr().err == ""  # the library prints its panics on its own
    with pytest.raises(BadArtifact, match=r"stranger.tokenizer\.json"):
        Text(folder, None)


@pytest.mark.parametrize("name", [name for name in HOSTILE if not name.startswith("repetitions")])
def test_without_a_helper_process_it_is_one_line_all_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a frozen application. What cannot be foreseen without trying it shows where it is used."""
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    folder = folder_with(tmp_path / "stranger", HOSTILE[name])
    with pytest.raises(BadInput, match=r"stranger.tokenizer\.json") as raised:
        text = Text(folder, None)
        for sample in probe_texts():
            text.decode(text.encode(sample)[:1])
        text.decode(list(text.vocabulary().values()))
    assert "\n" not in str(raised.value)


def test_a_panic_on_a_users_text_is_one_line(tmp_path: Path) -> None:
    """An expression that only one text makes backtrack passes the check, and is bounded by the library's own limit."""
    folder = folder_with(tmp_path / "stranger", {"pre_tokenizer": split(r"zq(?:(x|x)*)*$y|.")})
    text = Text(folder, None)
    assert text.encode("hello")
    with pytest.raises(BadArtifact, match=r"cannot encode this text with it: .*retry-limit"):
        text.encode("zq" + "x" * 60)
    assert text.encode("hello")


def test_added_tokens_beside_the_file_are_part_of_the_check(tmp_path: Path) -> None:
    """The check is remembered by all that the tokenizer is made of."""
    folder = folder_with(tmp_path / "stranger", {})
    load_tokenizer(folder / "tokenizer.json")
    marks = set((cache_folder() / "tokenizers").iterdir())
    load_tokenizer(folder / "tokenizer.json")
    assert set((cache_folder() / "tokenizers").iterdir()) == marks
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"extra_special_tokens": ["<|new|>"]}))
    load_tokenizer(folder / "tokenizer.json")
    assert len(set((cache_folder() / "tokenizers").iterdir()) - marks) == 1


def test_a_refused_tokenizer_is_not_remembered(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "stranger", HOSTILE["a replacement of nothing"])
    for _ in range(2):
        with pytest.raises(BadInput, match="more than 1024 times longer"):
            load_tokenizer(folder / "tokenizer.json")


def test_honest_tokenizers_pass(make_tokenizer: Callable[[int], Any], tmp_path: Path) -> None:
    """Growth that real tokenizers have: a space becomes a longer mark, tables of Unicode forms, expressions."""
    honest = [
        chain("normalizers", {"type": "Prepend", "prepend": "▁"}, replace("▁", String=" ")),
        chain("normalizers", {"type": "NFKC"}, {"type": "Lowercase"}, replace("▁", Regex=" {2,}")),
        chain("normalizers", *[{"type": kind} for kind in ("Nmt", "NFD", "StripAccents", "NFC", "NFKD")]),
    ]
    for number, normalizer in enumerate(honest):
        folder = folder_with(tmp_path / str(number), {"normalizer": normalizer})
        assert load_tokenizer(folder / "tokenizer.json").encode("Two  words").ids


def test_it_fails_as_the_library_does_where_a_vocabulary_lacks_characters(tmp_path: Path) -> None:
    """Such a vocabulary is honest: it is for its own texts."""
    model = {"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": None}
    changes = {"model": model, "added_tokens": [], "pre_tokenizer": None, "decoder": None}
    folder = folder_with(tmp_path / "small", changes)
    (folder / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    assert tokenizer.encode("aa").ids == [0, 0]
    with pytest.raises(BadInput, match=r"cannot encode this text with it: .*unk_id"):
        tokenizer.encode("b")


def test_ctrl_c_is_not_taken_for_a_panic(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(demo.TARGET / "tokenizer.json")

    class Interrupted:
        def encode(self, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer, "inner", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("a")


@pytest.mark.parametrize(
    ("executable", "starts"),
    [
        ("/usr/bin/python3.11", True),
        (r"python.exe", True),
        ("pythonw.exe", True),
        ("python3.13t", True),
        ("/opt/pypy3.11", True),
        ("/usr/bin/blender", False),
        ("uwsgi", False),
        ("", False),
        (None, False),
    ],
)
def test_only_interpreters_are_started(executable: str | None, starts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_interpreter(executable) is starts
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert not is_interpreter(executable)


def test_helpers_that_hang_or_die_are_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "helper.py"
    script.write_text("import json, sys; print(json.dumps([json.load(sys.stdin)]))")
    assert run_helper(script, {"ü": 1}, 10) == [{"ü": 1}]
    script.write_text("while True: pass")
    with pytest.raises(HelperStopped, match="takes more than 1 seconds"):
        run_helper(script, None, 1)
    script.write_text("import no_such_module")
    with pytest.raises(NoHelper):
        run_helper(script, None, 10)
    script.write_text("import os; os.abort()")
    with pytest.raises(HelperStopped, match="crashes"):
        run_helper(script, None, 10)
    monkeypatch.setattr(helper_process.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(NoHelper):
        run_helper(script, None, 10)
    assert guarded.problem_in_helper(tmp_path / "any", [], 0) is None
