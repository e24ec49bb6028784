"""Archives: the same bytes from the same files, and what pip reads in them."""

import csv
import io
import random
import tarfile
import zipfile
from base64 import urlsafe_b64decode
from hashlib import sha256
from pathlib import Path

import pytest
from archives import read_wheel, with_tag, write_sdist, write_wheel
from hypothesis import given
from hypothesis import strategies as st

WHEEL = b"Wheel-Version: 1.0\nGenerator: setuptools (84.2.1)\nRoot-Is-Purelib: true\nTag: py3-none-any\n\n"
FILES = {
    "pard_onnx/__init__.py": b"",
    "pard_onnx/runtime/kernels/_cpu.so": bytes(1000),
    "pard_onnx-1.0.dist-info/WHEEL": WHEEL,
    "pard_onnx-1.0.dist-info/METADATA": b"Name: pard-onnx\n",
    "pard_onnx-1.0.dist-info/RECORD": b"what another tool wrote\n",
}


def test_a_wheel_names_its_tags_and_files() -> None:
    made = with_tag(FILES, "manylinux_2_17_x86_64.manylinux2014_x86_64", pure=False)
    lines = made["pard_onnx-1.0.dist-info/WHEEL"].decode().splitlines()
    assert lines[:2] == WHEEL.decode().splitlines()[:2]
    assert lines[2:] == [
        "Root-Is-Purelib: false",
        "Tag: py3-none-manylinux_2_17_x86_64",
        "Tag: py3-none-manylinux2014_x86_64",
    ]
    rows = list(csv.reader(io.StringIO(made["pard_onnx-1.0.dist-info/RECORD"].decode())))
    assert rows.pop() == ["pard_onnx-1.0.dist-info/RECORD", "", ""]
    assert {row[0] for row in rows} == set(FILES) - {"pard_onnx-1.0.dist-info/RECORD"}
    for name, digest, size in rows:
        kind, _, value = digest.partition("=")
        assert (kind, int(size)) == ("sha256", len(made[name]))
        assert urlsafe_b64decode(value + "=") == sha256(made[name]).digest()


@given(st.permutations(sorted(FILES)), st.integers(0, 4_000_000_000))
def test_the_order_of_files_changes_no_byte_of_a_wheel(tmp_path_factory: pytest.TempPathFactory, order, epoch) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("wheels")
    for name, files in (("a", FILES), ("b", {one: FILES[one] for one in order})):
        write_wheel(with_tag(files, "any", pure=True), folder / name, epoch)
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes()
    again = read_wheel(folder / "a")
    assert with_tag(again, "any", pure=True) == again
    assert zipfile.ZipFile(folder / "a").namelist()[-1].endswith("/RECORD")


def sdist(path: Path, seed: int) -> Path:
    """An sdist of the same files in another order, of another time and user."""
    chance = random.Random(seed)
    names = ["p-1/setup.py", "p-1/.ci/run", "p-1/docs/ä.md", f"p-1/{'long/' * 40}name"]
    chance.shuffle(names)
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uid, info.uname = len(name), chance.random() * 1e9, seed, f"user{seed}"
            info.mode = (0o775, 0o755)[seed % 2] if name.endswith("run") else (0o664, 0o600)[seed % 2]
            archive.addfile(info, io.BytesIO(name.encode()[: info.size]))
    return path


def test_who_made_an_sdist_and_when_changes_no_byte(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_sdist(sdist(tmp_path / f"old{seed}.tar.gz", seed), tmp_path / f"{seed}.tar.gz", 1_700_000_000)
    assert (tmp_path / "1.tar.gz").read_bytes() == (tmp_path / "2.tar.gz").read_bytes()
    with tarfile.open(tmp_path / "1.tar.gz") as old, tarfile.open(tmp_path / "old1.tar.gz") as new:
        assert {one.name: old.extractfile(one).read() for one in old} == {  # type: ignore[union-attr]
            one.name: new.extractfile(one).read()  # type: ignore[union-attr]
            for one in new
        }
    with tarfile.open(tmp_path / "1.tar.gz") as archive:
        assert {one.name for one in archive if one.mode == 0o755} == {"p-1/.ci/run"}
        assert {(one.mtime, one.uid, one.uname) for one in archive} == {(1_700_000_000, 0, "")}
