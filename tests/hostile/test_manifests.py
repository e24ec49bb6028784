"""Manifests from a stranger, with a right digest: refused with one line, before anything is made by their numbers."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
from hostile import Json, copied, manifest_of, one_line, reseal, sealed

from pard_onnx.generate_command import main
from pard_onnx.models.errors import BadArtifact
from pard_onnx.models.manifest import FILE_NAME, Manifest

pytestmark = pytest.mark.timeout(30, func_only=True)
HUGE = 10**400


def put(path: str, value: object) -> Callable[[Json], None]:
    """Set the value at a path of keys and indices."""

    def edit(manifest: Any) -> None:
        *keys, last = (int(key) if key.isdigit() else key for key in path.split("."))
        for key in keys:
            manifest = manifest[key]
        manifest[last] = value

    return edit


def files(*names: str) -> Callable[[Json], None]:
    """List these files too."""
    return lambda manifest: manifest["files"].extend({"name": name, "size": 0, "sha256": "0" * 64} for name in names)


def without(*names: str) -> Callable[[Json], None]:
    return lambda value: value.update(files=[file for file in value["files"] if file["name"] not in names])


def graph(file: str, width: int = 8, logits: bool = True) -> Json:
    return {"file": file, "width": width, "logits": logits}


NUMBERS = ("layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "max_positions")
PATHS = [f"spec.{name}" for name in NUMBERS] + [
    "spec.vocabulary.rows", "spec.vocabulary.size", "capacity", "kv_rows", "files.0.size", "format_version",
]  # fmt: skip
# Named apart, since pytest would write 400 digits into a test's name
ABSURD = {
    "0": 0,
    "-1": -1,
    "2^31": 1 << 31,
    "2^62": 1 << 62,
    "huge": HUGE,
    "NaN": nan,
    "inf": inf,
    "text": "4",
    "list": [],
}
FINE = {
    ("files.0.size", "0"),
    ("files.0.size", "2^31"),
    ("spec.max_positions", "2^31"),
}  # judged by the file, or no cost


@pytest.mark.parametrize("value", ABSURD)
@pytest.mark.parametrize("path", PATHS)
def test_numbers(good: Path, tmp_path: Path, path: str, value: str) -> None:
    manifest = manifest_of(good)
    put(path, ABSURD[value])(manifest)
    (tmp_path / FILE_NAME).write_text(sealed(manifest))
    tracemalloc.start()
    try:
        if (path, value) in FINE:
            Manifest.read(tmp_path)
            return
        with pytest.raises(BadArtifact) as caught:
            Manifest.read(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600 and path.split(".")[-1] in str(caught.value)


SURROGATE = "\ud800"
MANIFESTS: dict[str, tuple[Callable[[Json], object], str]] = {
    "no files": (put("files", []), "its files have no model.onnx"),
    "no graph": (without("model.onnx"), "its files have no model.onnx"),
    "no data": (without("model.onnx.data"), "which the manifest does not list"),
    "no tokenizer": (without("tokenizer.json"), "its files have no tokenizer.json"),
    "a file twice": (files("a", "a"), "it lists the file 'a' twice"),
    "a file twice in another case": (files("MODEL.onnx"), "it lists the file 'model.onnx' twice"),
    "a file that is not there": (files("a"), "is missing"),
    "a hash of another length": (put("files.0.sha256", "0" * 63), "the hash of 'config.json' is"),
    "a hash with letters": (put("files.0.sha256", "g" * 64), "the hash of 'config.json' is"),
    "a hash of half a pair": (put("files.0.sha256", SURROGATE), "files[0].sha256: must be Unicode"),
    "a name of half a pair": (put("files.0.name", SURROGATE), "files[0].name: must be Unicode"),
    "a template of half a pair": (put("spec.chat_template", SURROGATE), "spec.chat_template: must be Unicode"),
    "an unknown key of half a pair": (put(SURROGATE, 1), "unknown key '\\ud800'"),
    "a long unknown key": (put("k" * 1_000_000, 1), "unknown key"),
    "a long unknown role": (put("role", "r" * 1_000_000), "must be one of"),
    "another role": (put("role", "draft"), "it is a draft whose spec is a target's"),
    "draft with the target's graph": (
        lambda m: (m.update(role="draft"), m["spec"].update(pard={"mask_id": 3, "spd_type": "pard"})),
        "is a draft, not a target",
    ),
    "mask outside": (put("spec.pard", {"mask_id": 1 << 20, "spd_type": "pard"}), "spec.pard.mask_id is 1048576"),
    "ends of text outside": (put("spec.vocabulary.eos_ids", [1 << 40]), "spec.vocabulary.eos_ids is 1099511627776"),
    "attention of 1 layer": (put("spec.attention", [{"window": 1, "rotary": "rope"}]), "spec.attention has 1 layers"),
    "a window of none": (put("spec.attention", [{"window": 0, "rotary": None}] * 6), "spec.attention.window is 0"),
    "more layers": (put("spec.layers", 7), "pard_onnx.json says 7 layers"),
    "the most layers": (put("spec.layers", 4096), "pard_onnx.json says 4096 layers"),
    "other heads": (put("spec.kv_heads", 4), "pard_onnx.json says batch 1, kv_heads 4"),
    "the largest heads": (lambda m: m["spec"].update(head_dim=1 << 14, kv_heads=1 << 14), "kv_heads 16384, kv_rows"),
    "other columns": (put("spec.vocabulary.rows", 1 << 24), "pard_onnx.json says 16777216 columns"),
    "another type": (lambda m: m.update(kv_dtype="int8", kv_cache="int8"), "int8"),
    "a type that does not fit": (put("kv_dtype", "int8"), "kv_cache is float, kv_dtype int8"),
    "another variant": (put("attention", "portable"), "has no input position_ids"),
    "an unknown variant": (put("attention", "x" * 1_000_000), "has 1000000 letters"),
    "width 0": (put("graphs", [graph("model.onnx", 0)]), "graphs.width is 0"),
    "negative width": (put("graphs", [graph("model.onnx", -8)]), "graphs.width is -8"),
    "huge width": (put("graphs", [graph("model.onnx", 1 << 31)]), "graphs.width is 2147483648"),
    "wider than the cache": (put("graphs", [graph("model.onnx", 5000)]), "capacity is"),
    "two of a width": (put("graphs", [graph("model.onnx"), graph("tokenizer.json")]), "two graphs have the width 8"),
    "no logits": (put("graphs", [graph("model.onnx", 8, False)]), "gives logits"),
    "width 1 alone": (put("graphs", [graph("model.onnx", 1)]), "gives logits"),
    "a graph outside": (put("graphs", [graph("../outside/secret.txt")]), "'../outside/secret.txt' is not the name of"),
    "an absolute graph": (put("graphs", [graph("/dev/zero")]), "'/dev/zero' is not the name of a file"),
    "an unlisted graph": (put("graphs", [graph("unlisted.onnx")]), "its files have no unlisted.onnx"),
    "another graph": (
        lambda m: m.update(graphs=[graph("tokenizer.json")], attention="portable"),
        "is not a graph that pard-export writes",
    ),
    "another vocabulary": (
        put("draft_vocabulary", {"size": 1 << 30, "text": "t", "sha256": "0" * 64, "coverage": 0.5}),
        "draft_vocabulary.size is 1073741824",
    ),
    "a list for a number": (put("opset", []), "opset: must be a whole number, not a list"),
}  # fmt: skip


@pytest.mark.parametrize("attack", MANIFESTS)
def test_manifests(good: Path, tmp_path: Path, attack: str, capfd: pytest.CaptureFixture[str]) -> None:
    folder, (edit, message) = copied(good, tmp_path / "folder"), MANIFESTS[attack]
    (folder / "unlisted.onnx").write_bytes((folder / "model.onnx").read_bytes())
    reseal(folder, edit)
    assert main(["--target", str(folder), "--prompt", "a"]) == 2
    assert message in one_line(capfd)


NAMES = [
    "../outside/secret.txt", "/etc/passwd", "a/b", "a\\b", ".", "..", "", "C:a", "a:stream", "NUL", "con.json",
    "COM1.txt", "a.", "a ", "a\0b", "a\nb", "é" * 128, "~/a\x7f/..",
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(NAMES)))
def test_names(good: Path, tmp_path: Path, index: int) -> None:
    manifest = manifest_of(good)
    files(NAMES[index])(manifest)
    (tmp_path / FILE_NAME).write_text(sealed(manifest))
    with pytest.raises(BadArtifact, match="is not the name of a file beside it"):
        Manifest.read(tmp_path)


def raw(good: Path) -> dict[str, str | bytes]:
    text = sealed(manifest_of(good))
    return {
        "nested": '{"a":' * 100_000 + "1" + "}" * 100_000,
        "nested lists": "[" * 1_000_000,
        "a key twice": text.replace('"opset"', '"opset": 1, "opset"', 1),
        "a key twice inside": text.replace('"layers"', '"layers": 1, "layers"', 1),
        "a number of 5000 digits": text.replace('"opset": 21', f'"opset": {"9" * 5000}'),
        "a version of many digits": text.replace('"format_version": 1', f'"format_version": {HUGE}'),
        "not UTF-8": text.encode() + b"\xff",
        "UTF-16": text.encode("utf-16"),
        "zeros": b"\0" * 100_000,
        "a list": "[]",
        "a number": "1",
        "Infinity": text.replace('"opset": 21', '"opset": Infinity'),
        "a large float": text.replace('"norm_eps": 1e-06', '"norm_eps": 1e999'),
    }


@pytest.mark.parametrize("attack", range(13))
def test_texts(good: Path, tmp_path: Path, attack: int) -> None:
    name, text = list(raw(good).items())[attack]
    (tmp_path / FILE_NAME).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadArtifact) as caught:
        Manifest.read(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600, name
    assert "has been changed since" not in str(caught.value) or name == "a list", name


def test_a_large_file(tmp_path: Path) -> None:
    """One terabyte, of which nothing is stored."""
    with (tmp_path / FILE_NAME).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(BadArtifact, match=r"has 1099511627776 bytes; at most 16777216 are read"):
        Manifest.read(tmp_path)


def test_the_same_manifest_with_other_spaces_is_read(good: Path, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(json.dumps(json.loads(sealed(manifest_of(good))), indent=7))
    assert Manifest.read(tmp_path) == Manifest.read(good)
