"""What the attacks of tests/hostile share: copies of good folders, resealed manifests, edited graphs, and one line."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from pard_onnx.models.manifest import FILE_NAME, SEAL

SECRET = "a private text"  # of a file outside the folder
GRAPH = "model.onnx"
Json = dict[str, Any]


def copied(source: Path, target: Path) -> Path:
    """A copy of a folder, of hard links where files are not edited in place."""
    shutil.copytree(source, target)
    (target.parent / "outside").mkdir(exist_ok=True)
    (target.parent / "outside" / "secret.txt").write_text(SECRET)
    return target


def sealed(value: Json) -> str:
    """The text of a manifest with a right digest, which anyone can compute."""
    body = {key: item for key, item in value.items() if key != SEAL}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
    return json.dumps(body | {SEAL: digest})


def manifest_of(folder: Path) -> Json:
    found: Json = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    return found


def reseal(folder: Path, edit: Callable[[Json], object] = lambda _: None) -> None:
    """Edit the manifest, and list the files that are there as they are now."""
    value = manifest_of(folder)
    for file in value["files"]:
        path = folder / file["name"]
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            file |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit(value)
    (folder / FILE_NAME).write_text(sealed(value))


def edit_graph(folder: Path, edit: Callable[[onnx.ModelProto], object]) -> None:
    """Edit the graph, and list it as it is now."""
    model = onnx.load(folder / GRAPH, load_external_data=False)
    edit(model)
    (folder / GRAPH).write_bytes(model.SerializeToString())
    reseal(folder)


def external(model: onnx.ModelProto, **values: str | bytes) -> None:
    """Change the place of a matrix."""
    tensor = next(t for t in model.graph.initializer if t.external_data and len(t.dims) > 2)
    for key, value in values.items():
        found = next((entry for entry in tensor.external_data if entry.key == key), None) or tensor.external_data.add()
        found.key = key
        found.value = value  # type: ignore[assignment]


def listen(path: Path) -> None:
    """A socket in a file's place."""
    here = Path.cwd()
    os.chdir(path.parent)  # the path of a socket has 108 bytes at most
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def replace(path: Path, make: Callable[[Path], object]) -> None:
    """Put something else in a file's place."""
    path.unlink(missing_ok=True)
    make(path)


def one_line(capfd: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr, which begins with `error: ` and tells nothing of files outside the folder."""
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: "), (out, err)
    assert SECRET not in err and "not foreseen" not in err and len(err) < 1000, err
    return err
