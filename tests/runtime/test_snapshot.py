"""Saved conversations: the same next tokens after a round trip, every refusal by name, whole files or none."""

import io
import json
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pard_onnx import BadArtifact, BadInput, Chat, Pair, TooLong, load

TEXTS = ("the quick fox", "jumps")


@pytest.fixture(scope="module")
def folders(write_artifact: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("saved")
    return {
        "target": write_artifact(root / "target", "target", kv_rows=320),
        "draft": write_artifact(root / "draft", "draft", rows=284, kv_rows=320),
        "other target": write_artifact(root / "other target", "target", seed=2, kv_rows=320),
        "other draft": write_artifact(root / "other draft", "draft", seed=2, kv_rows=320),
        "short draft": write_artifact(root / "short draft", "draft", kv_rows=64 + 40),
    }


@pytest.fixture(scope="module")
def pair(folders: dict[str, Path]) -> Iterator[Pair]:
    with load(folders["target"], folders["draft"], threads=1) as opened:
        yield opened


def talk(pair: Pair, **options: Any) -> Chat:
    chat = pair.chat("be brief")
    for text in TEXTS:
        chat.send(text, max_new_tokens=12, draft_length=4, **options)
    return chat


@pytest.fixture
def chat(pair: Pair) -> Chat:
    return talk(pair)


@pytest.fixture
def file(chat: Chat, tmp_path: Path) -> Path:
    path = tmp_path / "gespräch"  # no suffix is added
    chat.save(path)
    return path


def next_turn(chat: Chat) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    result = chat.send("over", max_new_tokens=12, draft_length=4)
    return result.tokens, result.stats.cached_tokens, result.stats.accepted


def held(chat: Chat) -> list[Any]:
    """All that a file is to bring back."""
    caches = chat._sequence
    assert caches
    models = [model for model in (caches.target, caches.draft) if model]
    rows = [model.read(0, model.length).tobytes() for model in models]
    return [chat.messages, caches.tokens, caches.memory.start, *rows]


def test_a_restored_conversation_goes_on_as_if_never_saved(
    pair: Pair, chat: Chat, file: Path, folders: dict[str, Path]
) -> None:
    with load(folders["target"], folders["draft"], threads=1) as another:
        for opened in (pair, another):
            restored = opened.restore(str(file))
            assert held(restored) == held(talk(opened))
            assert restored._sequence.draft.length > 20  # type: ignore[union-attr]
        expected = next_turn(chat)
        assert next_turn(pair.restore(file)) == next_turn(another.restore(file)) == expected
    assert expected[1] > 20


def test_the_file_is_plain_arrays(file: Path, chat: Chat) -> None:
    with np.load(file, allow_pickle=False) as found:
        kinds = {name: (found[name].dtype.name, found[name].ndim) for name in found.files}
        assert json.loads(found["messages"].tobytes()) == chat.messages
    assert kinds == {
        "header": ("uint8", 1), "messages": ("uint8", 1), "tokens": ("int64", 1),
        "target": ("float32", 4), "draft": ("float32", 4),
    }  # fmt: skip


def test_a_conversation_not_begun_yet(pair: Pair, tmp_path: Path) -> None:
    pair.chat("be brief").save(tmp_path / "new")
    restored = pair.restore(tmp_path / "new")
    assert restored.messages == [{"role": "system", "content": "be brief"}]
    assert restored.send("fox", max_new_tokens=3).stats.cached_tokens == 0


def test_a_draft_that_read_the_end_of_the_conversation_only(pair: Pair, chat: Chat, tmp_path: Path) -> None:
    caches = chat._sequence
    assert caches and caches.draft
    caches.draft.rollback(5)
    caches.memory.start = 7
    chat.save(tmp_path / "windowed")
    assert held(pair.restore(tmp_path / "windowed")) == held(chat)


def test_history_edited_before_it_was_saved(pair: Pair, chat: Chat, tmp_path: Path) -> None:
    chat.messages[1]["content"] = "the quick hen"
    chat.save(tmp_path / "edited")
    assert next_turn(pair.restore(tmp_path / "edited")) == next_turn(chat)


@pytest.mark.parametrize("draft", ["other draft", None])
def test_another_draft_begins_anew_and_the_target_goes_on(
    chat: Chat, file: Path, folders: dict[str, Path], draft: str | None
) -> None:
    with load(folders["target"], draft and folders[draft], threads=1) as opened:
        restored = opened.restore(file)
        caches = restored._sequence
        assert caches and (caches.draft is None if draft is None else caches.draft.length == 0)
        found = next_turn(restored)
    assert found[:2] == next_turn(chat)[:2]


def test_a_conversation_without_a_draft_gets_one(pair: Pair, folders: dict[str, Path], tmp_path: Path) -> None:
    with load(folders["target"], threads=1) as plain:
        chat = talk(plain)
        chat.save(tmp_path / "plain")
        expected = next_turn(chat)
    found = next_turn(pair.restore(tmp_path / "plain"))
    assert found[:2] == expected[:2]
    assert max(found[2]) > 1


def test_another_target_is_refused(file: Path, folders: dict[str, Path]) -> None:
    with load(folders["other target"], folders["draft"], threads=1) as opened:
        with pytest.raises(BadArtifact, match="gespräch: was saved with another target, an export of toy-target in fp"):
            opened.restore(file)
        assert opened.generate("fox", max_new_tokens=2).finish_reason == "length"


def test_a_conversation_longer_than_the_capacity_is_refused(file: Path, folders: dict[str, Path]) -> None:
    with (
        load(folders["target"], folders["short draft"], threads=1) as opened,
        pytest.raises(TooLong, match=r"gespräch: the conversation has \d+ tokens, but the capacity is 40"),
    ):
        opened.restore(file)


def rewritten(file: Path, **changes: Any) -> None:
    """The file with other arrays; header: keys of its JSON."""
    with np.load(file) as found:
        arrays = {name: found[name] for name in found.files}
    for name, value in changes.items():
        if name == "header":
            value = packed(json.loads(arrays["header"].tobytes()) | value)
        arrays[name] = value
    with file.open("wb") as out:
        np.savez(out, **{name: array for name, array in arrays.items() if array is not None})


def packed(value: object) -> Any:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"header": {"version": 2}}, r"has format version 2, this pard-onnx reads 1"),
        ({"header": {"format": "something else"}}, "is no saved conversation"),
        ({"header": {"colour": 1}}, "is damaged .unknown key 'colour'"),
        ({"header": {"draft_start": -1}}, "is damaged .more KV rows than tokens"),
        ({"header": {"draft_start": 99}}, "is damaged .more KV rows than tokens"),
        ({"header": {"target": None}}, "is damaged .target: must be an object"),
        ({"tokens": np.array([280], np.int64)}, "is damaged .tokens that the tokenizer does not have"),
        ({"tokens": np.array([-1], np.int64)}, "is damaged .tokens that the tokenizer does not have"),
        ({"tokens": np.array([1.0, 2.0])}, "is damaged .tokens that are none"),
        ({"tokens": np.array([[1]], np.int64)}, "is damaged .tokens that are none"),
        ({"tokens": np.array(5)}, "is damaged"),
        ({"tokens": np.array([1, 2], np.int64)}, "is damaged .more KV rows than tokens"),
        ({"target": np.zeros((4, 1, 2, 8), np.float32)}, "is damaged .KV rows of shape .4, 1, 2, 8. and type float32"),
        ({"target": np.zeros((4, 1, 2, 16), np.float16)}, "is damaged .KV rows of shape .* and type float16"),
        ({"draft": np.zeros((4, 1, 999, 16), np.float32)}, "is damaged .KV rows of shape"),
        ({"target": None}, "is damaged .*target"),
        ({"draft": None}, "is damaged .*draft"),
        ({"messages": packed("hi")}, "is damaged .messages are a list"),
        ({"messages": packed([{"content": "hi"}])}, "is damaged .a message has a role"),
        ({"messages": np.frombuffer(b"[{", np.uint8)}, "is damaged"),
        ({"messages": packed([])[:0]}, "is damaged"),
    ],
    ids=repr,
)
def test_what_cannot_be_is_refused(pair: Pair, file: Path, changes: dict[str, Any], problem: str) -> None:
    rewritten(file, **changes)
    with pytest.raises(BadArtifact, match=f"gespräch: {problem}") as caught:
        pair.restore(file)
    assert "\n" not in str(caught.value)


class Trap:
    """Unpickled, it would tell."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle was loaded",)


def test_files_of_others_are_refused_and_never_unpickled(pair: Pair, file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"")
    stranger, array = io.BytesIO(), io.BytesIO()
    np.savez(stranger, a=np.zeros(3))
    np.save(array, np.zeros(3))
    for content in (b"", b"hello", pickle.dumps(Trap()), stranger.getvalue(), array.getvalue()):
        other.write_bytes(content)
        with pytest.raises(BadArtifact, match=r"other: is no saved conversation; name a file that Chat\.save or /save"):
            pair.restore(other)
    for name in ("header", "messages", "tokens", "target", "draft"):
        good = file.read_bytes()
        with np.load(file) as found:
            arrays = {key: found[key] for key in found.files}
        arrays[name] = np.array([Trap()], object)
        with file.open("wb") as out:
            np.savez(out, **arrays)
        with pytest.raises(BadArtifact, match="is damaged"):
            pair.restore(file)
        file.write_bytes(good)
    with pytest.raises(BadArtifact, match="nowhere: no such file"):
        pair.restore(tmp_path / "nowhere")
    with pytest.raises(BadArtifact, match="cannot be read: "):
        pair.restore(tmp_path)


def test_damaged_files_are_refused_wherever_the_damage_is(pair: Pair, chat: Chat, file: Path) -> None:
    """Or it is in bytes of the archive that mean nothing, as dates do: then it is the same conversation."""
    good, expected, harmless = file.read_bytes(), held(chat), 0
    rng = random.Random(0)
    end = len(good)
    places = {*range(120), *range(end - 400, end), *(rng.randrange(end) for _ in range(200))}
    for place in sorted(places):
        changed = bytearray(good)
        changed[place] ^= 1 << rng.randrange(8)
        file.write_bytes(changed)
        try:
            found = held(pair.restore(file))
        except BadArtifact as error:
            assert str(error).startswith(str(file))
        else:
            harmless += 1
            assert found == expected
    assert harmless < len(places) / 4
    for size in sorted({0, 1, 2, 3, 4, 30, end - 1, *(rng.randrange(end) for _ in range(60))}):
        file.write_bytes(good[:size])
        with pytest.raises(BadArtifact):
            pair.restore(file)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
def test_half_a_file_is_never_there(
    chat: Chat, file: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = file.read_bytes()

    def half(out: Any, **_: object) -> None:
        out.write(before[: len(before) // 2])
        raise error

    monkeypatch.setattr(np, "savez", half)
    for path in (file, file.with_name("new")):
        with pytest.raises((BadInput, KeyboardInterrupt, MemoryError)) as caught:
            chat.save(path)
        assert not isinstance(error, OSError) or f"{path}: cannot be written: No space left" in str(caught.value)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert file.read_bytes() == before


def test_a_saved_conversation_is_replaced_and_nothing_else(chat: Chat, file: Path) -> None:
    chat.send("and", max_new_tokens=3)
    before = file.read_bytes()
    chat.save(file)
    assert file.read_bytes() != before
    notes = file.with_name("notes.txt")
    notes.write_text("mine", encoding="utf-8")
    with pytest.raises(BadInput, match=r"notes.txt: is there already, and is no saved conversation; choose another"):
        chat.save(notes)
    assert notes.read_text(encoding="utf-8") == "mine"
    with pytest.raises(BadInput, match="is there already, and is no saved conversation"):
        chat.save(file.parent)


def test_what_cannot_be_written_is_said(chat: Chat, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no/such/folder: cannot be written: "):
        chat.save(tmp_path / "no" / "such" / "folder")
    with pytest.raises(BadInput, match=r"path: .* has a null character"):
        chat.save("a\0b")
    chat.messages[0]["content"] = object()
    with pytest.raises(BadInput, match="the messages cannot be saved: Object of type object is not JSON"):
        chat.save(tmp_path / "never")
    assert list(tmp_path.iterdir()) == []
