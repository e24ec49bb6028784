"""Broken, hostile and unsupported GGUF files: one line with the file's name, and no large allocation."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf_files
import pytest

from pard_onnx.export_command import main
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.checkpoints.gguf.file import GgufFile
from pard_onnx.models.errors import BadCheckpoint

Tiny = Callable[..., Path]
U32, U64 = struct.Struct("<I"), struct.Struct("<Q")


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return U64.pack(len(raw)) + raw


def header(tensors: int = 0, entries: int = 0, *, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + U32.pack(version) + U64.pack(tensors) + U64.pack(entries)


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + U32.pack(kind) + value


def tensor(name: str, dimensions: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    sizes = b"".join(U64.pack(size) for size in dimensions)
    return text(name) + U32.pack(len(dimensions)) + sizes + U32.pack(kind) + U64.pack(offset)


ENTRY = entry("a", 4, U32.pack(7))
HUGE = (1 << 64) - 1
BROKEN = {
    "empty": (b"", "truncated or not GGUF: it has 0 bytes"),
    "short": (b"GGUF", "truncated or not GGUF: it has 4 bytes"),
    "another format": (b"PK\x03\x04" + bytes(40), r"not a GGUF file: it begins with b'PK\x03\x04'"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(40), "is big-endian GGUF, which is not read"),
    "version 1": (header(version=1) + bytes(40), "is GGUF version 1; 2 and 3 are read"),
    "version 4": (header(version=4) + bytes(40), "is GGUF version 4"),
    "tensors": (header(HUGE) + bytes(40), f"the header claims {HUGE} tensors and 0 entries"),
    "entries": (header(0, 1 << 40) + bytes(40), f"the header claims 0 tensors and {1 << 40} entries"),
    "more entries": (header(0, 5) + ENTRY, "truncated: ends within metadata entry 1"),
    "more tensors": (header(5, 1) + ENTRY + tensor("t", (1,)), "truncated: ends within the description of tensor 1"),
    "key": (header(0, 1) + U64.pack(HUGE) + bytes(40), f"metadata entry 0 claims a text of {HUGE} bytes"),
    "key's bytes": (header(0, 1) + entry(b"\xff\xfe", 4, U32.pack(7)), "metadata entry 0 has a name that is not UTF-8"),
    "value type": (header(0, 1) + entry("a", 99, bytes(40)), "a has the unknown value type 99"),
    "list": (header(0, 1) + entry("a", 9, U32.pack(4) + U64.pack(HUGE)), f"a claims a list of {HUGE}"),
    "long list": (header(0, 1) + entry("a", 9, U32.pack(4) + U64.pack(1 << 23)), "truncated: ends within a;"),
    "list of texts": (header(0, 1) + entry("a", 9, U32.pack(8) + U64.pack(1 << 23)), f"a claims a list of {1 << 23}"),
    "list of lists": (
        header(0, 1) + entry("a", 9, U32.pack(9) + U64.pack(1)) + bytes(40),
        "a list of the unknown value type 9",
    ),
    "twice": (header(0, 2) + ENTRY + ENTRY, "has a twice"),
    "tensor twice": (header(2) + tensor("t", (1,)) * 2 + bytes(64), "has two tensors t"),
    "dimensions": (header(1) + tensor("t", (1,) * 5), "tensor t claims 5 dimensions"),
    "no dimensions": (header(1) + tensor("t", ()), "tensor t claims 0 dimensions"),
    "extent": (header(1) + tensor("t", (0, 4)), "tensor t claims the shape [4, 0]"),
    "extents": (header(1) + tensor("t", (HUGE, HUGE)), f"tensor t claims the shape [{HUGE}, {HUGE}]"),
    "product": (header(1) + tensor("t", (1 << 40, 1 << 20)), "tensor t claims the shape"),
    "tensor type": (header(1) + tensor("t", (256,), 16), "tensor t is stored as IQ2_XXS; supported: F32, F16"),
    "no type": (header(1) + tensor("t", (256,), 77), "tensor t is stored as type 77; supported: F32, F16"),
    "block": (header(1) + tensor("t", (48, 2), 2), "tensor t claims rows of 48, no multiple of Q4_0's 32"),
    "offset": (header(1) + tensor("t", (4,), 0, 1 << 40), "truncated: tensor t ends at byte"),
    "offset at the end": (header(1) + tensor("t", (4,), 0, HUGE), "truncated: tensor t ends at byte"),
    "data": (header(1) + tensor("t", (1 << 30,)), "truncated: tensor t ends at byte 4294967"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(tmp_path: Path, name: str) -> None:
    content, message = BROKEN[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(BadCheckpoint) as caught:
            GgufFile.read(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_any_prefix_and_any_changed_byte_is_refused_or_read(tiny: Tiny, tmp_path: Path) -> None:
    path, broken = tmp_path / "model.gguf", tmp_path / "broken.gguf"
    gguf_files.write(path, tiny(tmp_path / "tiny", "llama", layers=1), "Q4_0")
    content, rng = path.read_bytes(), random.Random(0)
    end = min(t.offset for t in GgufFile.read(path).tensors.values())
    prefixes = [content[: rng.randrange(len(content))] for _ in range(150)]
    changed = []
    for _ in range(400):
        other = bytearray(content)
        for _ in range(rng.choice((1, 1, 4))):
            place = rng.randrange(rng.choice((200, 4000, end)))
            other[place] = rng.choice((0, 1, 255, 128, other[place] ^ (1 << rng.randrange(8))))
        changed.append(bytes(other))
    for index, data in enumerate(prefixes + changed):
        broken.write_bytes(data)
        try:
            Checkpoint.open(broken)
        except BadCheckpoint as error:
            assert "\n" not in str(error)
        else:
            assert index >= len(prefixes)


def test_texts_that_are_not_utf8(tiny: Tiny, tmp_path: Path) -> None:
    """A description is nobody's business; tokens and merges are."""
    path = tmp_path / "model.gguf"
    metadata = {"general.description": "a text"}
    gguf_files.write(path, tiny(tmp_path / "tiny", "llama"), metadata=metadata)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"a text", b"a \xfe\xffxt"))
    Checkpoint.open(path)
    place = content.index(b"<|im_start|>")
    path.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
    with pytest.raises(
        BadCheckpoint, match=r"tokenizer.ggml.tokens has b'\\xff\|im_start\|>' at 298, which is not UTF-8"
    ):
        Checkpoint.open(path)


@pytest.mark.parametrize("family", ["llama", "smollm3", "gemma3_text"])
def test_any_number_of_layers(tiny: Tiny, tmp_path: Path, family: str) -> None:
    path = tmp_path / "model.gguf"
    name = gguf_files.ARCHITECTURE.get(family, family)
    layers = (1 << 32) - 1
    gguf_files.write(path, tiny(tmp_path / "tiny", family), metadata={f"{name}.block_count": layers})
    with pytest.raises(BadCheckpoint, match=f"{name}.block_count is {layers}, but the file has [0-9]+ tensors"):
        Checkpoint.open(path)


def test_parts(tiny: Tiny, tmp_path: Path) -> None:
    """A model in several files: named by its first one."""
    whole = tmp_path / "whole.gguf"
    folder = tiny(tmp_path / "tiny", "llama")
    gguf_files.write(whole, folder)
    parts = gguf_files.split(whole, tmp_path / "model", 3)
    truth, found = Checkpoint.open(whole), Checkpoint.open(parts[0])
    assert truth.spec == found.spec and truth.folder == found.folder
    for name, entry in truth.tensors.items():
        assert (entry.read(0, 3) == found.tensors[name].read(0, 3)).all()
    with pytest.raises(BadCheckpoint, match=r"is part 2 of 3; name the first, model-00001-of-00003\.gguf"):
        Checkpoint.open(parts[1])
    parts[2].unlink()
    with pytest.raises(BadCheckpoint, match=r"model-00003-of-00003.gguf: is missing beside model-00001"):
        Checkpoint.open(parts[0])


def test_the_command_writes_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(header(HUGE) + bytes(40))
    assert main(["--model", str(path), "--output", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(path) in err and not (tmp_path / "out").exists()
