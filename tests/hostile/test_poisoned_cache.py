"""Whatever lies in the cache folder, texts and exactness are those of an empty one."""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pard_onnx import Pair, PardWarning, load
from pard_onnx.models import cache_folder
from pard_onnx.models.records import to_json
from pard_onnx.runtime.tuning.remembered import digest
from pard_onnx.runtime.tuning.steps import ANY, CANDIDATES, Widths

PROMPTS = ("the quick brown", "lazy dog over")
NASTY = (0, -1, 1, 2, 10**9, 2**63, 10**400, -(10**400), 0.0, -1.0, 1e-300, 1e308, float("inf"), float("nan"))
JSON = st.recursive(
    st.none() | st.booleans() | st.sampled_from(NASTY) | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
posix = pytest.mark.skipif(os.name != "posix", reason="no owners and modes of files")


def paths(value: Any) -> Iterator[tuple[Any, ...]]:
    """The places in a JSON value."""
    yield ()
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from ((key, *path) for path in paths(inner))


def changed(value: Any, path: tuple[Any, ...], new: Any, *, remove: bool) -> Any:
    """The value with another one at this place, or without it."""
    if not path:
        return new
    out = value.copy()
    if remove and len(path) == 1:
        del out[path[0]]
    else:
        out[path[0]] = changed(value[path[0]], path[1:], new, remove=remove)
    return out


def seal(path: Path, record: Any) -> None:
    """Write the record with its digest, as a program with this package's code could."""
    path.write_text(json.dumps({"digest": digest(path, record), "record": record}))
    path.chmod(0o600)


def texts(pair: Pair) -> list[tuple[tuple[int, ...], bool]]:
    runs = [pair.generate(prompt, max_new_tokens=12, draft_length=k) for prompt in PROMPTS for k in ("auto", 3, 0)]
    return [(run.tokens, run.stats.exact) for run in runs]


@pytest.fixture(scope="module")
def kept(pair_folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Path, bytes]]:
    """The files of a cache folder that is in use, with what they held at first."""
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PARD_ONNX_CACHE", str(folder))
        with load(*pair_folders, threads=1) as pair:
            EXPECTED[:] = texts(pair)
        yield {path: path.read_bytes() for path in (folder / "machine").iterdir()}


EXPECTED: list[tuple[tuple[int, ...], bool]] = []


@settings(max_examples=40)
@given(data=st.data(), sealed=st.booleans())
def test_any_json_in_the_cache_gives_the_texts_of_an_empty_one(
    kept: dict[Path, bytes], pair_folders: tuple[Path, Path], data: st.DataObject, sealed: bool
) -> None:
    """sealed: whether the digest is right."""
    for path, content in kept.items():
        whole = json.loads(content)
        path.unlink(missing_ok=True)
        value = whole["record"] if sealed else whole
        place = data.draw(st.sampled_from(sorted(paths(value), key=repr)))
        value = changed(value, place, data.draw(JSON), remove=data.draw(st.booleans()))
        if sealed:
            seal(path, value)
        else:
            path.write_text(json.dumps(value))
            path.chmod(0o600)
    begin = time.perf_counter()
    with load(*pair_folders, threads=1) as pair:
        assert texts(pair) == EXPECTED
    assert time.perf_counter() - begin < 10


@pytest.mark.parametrize("claim", [None, *CANDIDATES])
def test_any_claim_about_widths_gives_the_same_exactness(
    kept: dict[Path, bytes], pair_folders: tuple[Path, Path], claim: Widths | None
) -> None:
    for path, content in kept.items():
        record = json.loads(content)["record"]
        seal(path, record | {"widths": to_json(claim), "tried": [1, 2, 16]})
    with load(*pair_folders, threads=1) as pair:
        assert texts(pair) == EXPECTED


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff" * 99, b"[" * 10**6, b"9" * 10**7, b'{"digest": 1e999, "record": {}}'],
    ids=["empty", "cut", "no text", "deep", "large", "infinite"],
)
def test_a_file_of_any_content_is_measured_again(
    kept: dict[Path, bytes], pair_folders: tuple[Path, Path], content: bytes
) -> None:
    for path in kept:
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        path.chmod(0o600)
    with load(*pair_folders, threads=1) as pair:
        assert texts(pair) == EXPECTED
    assert all(path.read_bytes() != content for path in kept)


def test_a_claim_that_every_width_is_exact_is_tried_on_the_session(
    demo_folder: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARD_ONNX_CACHE", str(tmp_path))
    monkeypatch.setenv("PARD_ONNX_KERNEL", "off")
    target = demo_folder("demo-target", "int4")
    with load(target, threads=1) as pair:
        true = pair.exact_widths
    if true == ANY:
        pytest.skip("ONNX Runtime's own matmuls are exact at every width here")
    (path,) = (tmp_path / "machine").iterdir()
    seal(path, json.loads(path.read_bytes())["record"] | {"widths": to_json(ANY)})
    with load(target, threads=1) as pair:
        assert pair.exact_widths == true


@posix
def test_others_cannot_read_what_is_kept(kept: dict[Path, bytes], pair_folders: tuple[Path, Path]) -> None:
    for path in kept:
        path.unlink(missing_ok=True)
    load(*pair_folders, threads=1).close()
    assert {path.stat().st_mode & 0o777 for path in kept} == {0o600}
    assert {path.parent.stat().st_mode & 0o777 for path in kept} == {0o700}


@posix
@pytest.mark.parametrize("inner", [".", "machine", "stamps"])
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_can_write_is_ignored_with_one_line(
    pair_folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inner: str, mode: int
) -> None:
    monkeypatch.setenv("PARD_ONNX_CACHE", str(tmp_path / "cache"))
    load(*pair_folders, threads=1).close()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / inner).rglob("*") if path.is_file()}
    (tmp_path / "cache" / inner).chmod(mode)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        load(*pair_folders, threads=1).close()
        load(*pair_folders, threads=1).close()
    assert [warning.category for warning in found] == [PardWarning]
    assert "can be written by other users" in str(found[0].message)
    assert "PARD_ONNX_CACHE" in str(found[0].message)
    assert before == {path: path.stat().st_mtime_ns for path in before}


@posix
def test_what_belongs_to_another_user_is_ignored(
    pair_folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARD_ONNX_CACHE", str(tmp_path / "cache"))
    load(*pair_folders, threads=1).close()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.warns(PardWarning, match=rf"belongs to another user \(id {os.getuid()}\)"):
        load(*pair_folders, threads=1).close()


@posix
@pytest.mark.parametrize("kind", ["fifo", "link", "folder", "writable"])
def test_only_plain_files_of_the_user_are_read(
    kept: dict[Path, bytes], pair_folders: tuple[Path, Path], tmp_path: Path, kind: str
) -> None:
    for path, content in kept.items():
        path.unlink(missing_ok=True)
        (tmp_path / path.name).write_bytes(content)
        if kind == "fifo":
            os.mkfifo(path, 0o600)
        elif kind == "link":
            path.symlink_to(tmp_path / path.name)
        elif kind == "folder":
            path.mkdir()
        else:
            path.write_bytes(content)
            path.chmod(0o666)
    with load(*pair_folders, threads=1) as pair:
        assert texts(pair) == EXPECTED
    for path in kept:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


@pytest.fixture(autouse=True)
def warned_anew() -> None:
    cache_folder._warn_once.cache_clear()
