"""Saved conversations of strangers: a conversation, or BadInput at once and in little memory, whatever is in them."""

from __future__ import annotations

import io
import os
import random
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pard_onnx import BadInput, Pair, load

MUTATIONS = 600


@pytest.fixture(scope="module")
def pair(write_artifact: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    root = tmp_path_factory.mktemp("chats")
    with load(write_artifact(root / "target", "target"), write_artifact(root / "draft", "draft"), threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def saved(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    chat = pair.chat("be brief")
    chat.send("the fox", max_new_tokens=4)
    path = tmp_path_factory.mktemp("saved") / "chat"
    chat.save(path)
    return path.read_bytes()


def members(saved: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(saved)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(content: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return out.getvalue()


def array(shape: str, dtype: str = "<i8", data: bytes = b"") -> bytes:
    """An .npy file whose header says what it likes."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


def refused(pair: Pair, path: Path, content: bytes) -> str:
    """The one line that refuses the file, at once and in little memory."""
    path.write_bytes(content)
    tracemalloc.start()
    start = time.perf_counter()
    try:
        with pytest.raises(BadInput) as raised:
            pair.restore(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - start < 1
    assert peak < 4 * len(content) + 4_000_000
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("name", ["header", "draft"])
def test_a_file_that_inflates_is_refused_before_it_does(pair: Pair, saved: bytes, tmp_path: Path, name: str) -> None:
    content = members(saved)
    content[f"{name}.npy"] += bytes(100_000_000)
    bomb = packed(content, zipfile.ZIP_DEFLATED)
    assert len(bomb) < 1_000_000
    assert "compressed arrays" in refused(pair, tmp_path / "bomb", bomb)


@pytest.mark.parametrize("name", ["header", "messages", "tokens", "target", "draft"])
@pytest.mark.parametrize(
    "shape",
    ["(1099511627776,)", "(4611686018427387904, 4)", "(0, 99)", "(-1,)", "(3, -5)", "(1.5,)", "('a',)", "(" * 90],
)
def test_a_length_that_the_file_does_not_have_is_not_allocated(
    pair: Pair, saved: bytes, tmp_path: Path, name: str, shape: str
) -> None:
    content = members(saved)
    content[f"{name}.npy"] = array(shape, data=bytes(64))
    assert str(tmp_path / "lie") in refused(pair, tmp_path / "lie", packed(content))


@pytest.mark.parametrize("dtype", ["O", "<U9", "V8", "<M8[s]", "|S8", "<c16", "|b1", "<i8,<i8"])
def test_arrays_hold_numbers(pair: Pair, saved: bytes, tmp_path: Path, dtype: str) -> None:
    content = members(saved) | {"tokens.npy": array("(8,)", dtype, bytes(64))}
    assert "is damaged" in refused(pair, tmp_path / "odd", packed(content))


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b'{"role":' * 9000, b"[1e999]", b"9" * 9000, b'[{"role": 5}]', b"\xff"]
)
def test_messages_that_are_none(pair: Pair, saved: bytes, tmp_path: Path, text: bytes) -> None:
    content = members(saved) | {"messages.npy": array(f"({len(text)},)", "|u1", text)}
    assert "is damaged" in refused(pair, tmp_path / "odd", packed(content))


def test_a_central_directory_that_lies(pair: Pair, saved: bytes, tmp_path: Path) -> None:
    at = saved.rindex(b"PK\x01\x02")
    for field in (20, 24):  # the sizes of the last member
        lie = bytearray(saved)
        lie[at + field : at + field + 4] = (0x7FFFFFFF).to_bytes(4, "little")
        refused(pair, tmp_path / "lie", bytes(lie))
    lie[at + 20 : at + 28] = (0x7FFFFFFF).to_bytes(4, "little") * 2
    assert "longer than the file" in refused(pair, tmp_path / "lie", bytes(lie))


def test_names_that_stand_there_twice(pair: Pair, saved: bytes, tmp_path: Path) -> None:
    out = io.BytesIO(saved)
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(out, "a") as archive:
        archive.writestr("tokens.npy", array("(8,)", data=bytes(64)))
    assert "same name" in refused(pair, tmp_path / "twice", out.getvalue())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_not_waited_for(pair: Pair, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    found: list[Any] = []

    def restore() -> None:
        with pytest.raises(BadInput, match="it is no file"):
            pair.restore(tmp_path / "pipe")
        found.append(True)

    thread = threading.Thread(target=restore, daemon=True)
    thread.start()
    thread.join(5)
    assert found


def test_mutated_files_are_refused_or_read(pair: Pair, saved: bytes, tmp_path: Path) -> None:
    """Bytes are changed, cut out and repeated; nothing but BadInput comes of it."""
    rng, path = random.Random(5), tmp_path / "mutated"
    outcomes = {"read": 0, "refused": 0}
    texts = members(saved)
    for number in range(MUTATIONS):
        if number % 3:  # in an array, whose check sum is then made again
            content = dict(texts)
            name = rng.choice(list(content))
            content[name] = mutated(content[name], rng)
            data = packed(content)
        else:
            data = mutated(saved, rng)
        path.write_bytes(data)
        try:
            pair.restore(path).close()
            outcomes["read"] += 1
        except BadInput as error:
            assert "\n" not in str(error) and len(str(error)) <= 1200
            outcomes["refused"] += 1
    assert outcomes["refused"] > MUTATIONS // 3


def mutated(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 4])):
        at = rng.randrange(min(len(out), rng.choice([200, len(out)])) or 1)
        kind = rng.randrange(4)
        if kind == 0:
            out[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del out[at : at + rng.randrange(1, 40)]
        elif kind == 2:
            out[at:at] = out[at : at + rng.randrange(1, 40)]
        else:
            out[at : at + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"9999", (2**31).to_bytes(4, "little")])
    return bytes(out)


def test_numbers_are_read_as_they_were_written(pair: Pair, saved: bytes, tmp_path: Path) -> None:
    """The reader gives what numpy's own gives."""
    path = tmp_path / "chat"
    path.write_bytes(saved)
    chat = pair.restore(path)
    with np.load(path) as arrays:
        sequence = chat._sequence
        assert sequence is not None
        assert sequence.tokens == arrays["tokens"].tolist()
        assert np.array_equal(sequence.target.read(0, sequence.target.length), arrays["target"])
