"""The forms of a checkpoint that peers read, made when first asked for and kept in a cache folder."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args
from uuid import uuid4

from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.checks import Progress
from pard_onnx.models.errors import BadInput, Failure
from pard_onnx.models.manifest import Source
from pard_onnx.models.precision import Precision

from .gguf_file import GgufFormat, write_gguf
from .process import HERE, events

SILENCE = 3600.0  # seconds; a framework's own export says nothing until it is done


@dataclass(frozen=True, slots=True)
class Workshop:
    """Where forms are kept, and what makes them: `python` is the peer's own."""

    cache: Path
    python: Path
    progress: Progress


def checkpoint(folder: Path, _: str, __: Workshop) -> Path:
    return folder


def artifact(folder: Path, name: str, shop: Workshop) -> Path:
    """An exported folder of role target: an autoregressive draft is decoded like a target."""
    return _once(shop.cache / f"{identity(folder)}-{name}", lambda output: _export(folder, name, output, shop))


def _export(folder: Path, name: str, output: Path, shop: Workshop) -> None:
    try:
        from pard_onnx.export.exporter import Job, export
    except ImportError as error:
        raise BadInput(f'{error.name} is not installed; run: pip install "pard-onnx[cpu,export]"') from error
    opened = Checkpoint.open(folder).as_role("target")
    export(Job(opened, Source(folder.name), output, cast(Precision, name), verify=False), shop.progress)


def gguf(folder: Path, name: str, shop: Workshop) -> Path:
    return _once(shop.cache / f"{identity(folder)}-{name}.gguf", lambda output: _gguf(folder, name, output, shop))


def _gguf(folder: Path, name: str, output: Path, shop: Workshop, *, native: bool = False) -> None:
    if name not in get_args(GgufFormat):
        raise BadInput(f"GGUF files are not written in {name}")
    write_gguf(Checkpoint.open(folder), output, cast(GgufFormat, name), native=native, progress=shop.progress)


def openvino(folder: Path, name: str, shop: Workshop) -> Path:
    """A folder of OpenVINO's own files, made by OpenVINO GenAI from a GGUF file: a draft cannot be given as GGUF."""

    def make(output: Path) -> None:
        output.mkdir()
        _gguf(folder, name, output / "model.gguf", shop, native=True)
        _run("openvino_form.py", {"gguf": str(output / "model.gguf")}, shop)
        (output / "model.gguf").unlink()

    return _once(shop.cache / f"{identity(folder)}-openvino-{name}", make)


def optimum(folder: Path, name: str, shop: Workshop) -> Path:
    def make(output: Path) -> None:
        _run("optimum_form.py", {"checkpoint": str(folder), "output": str(output), "format": name}, shop)

    return _once(shop.cache / f"{identity(folder)}-optimum-{name}", make)


FORMS: dict[str, Callable[[Path, str, Workshop], Path]] = {
    "checkpoint": checkpoint,
    "artifact": artifact,
    "gguf": gguf,
    "openvino": openvino,
    "optimum": optimum,
}


def identity(folder: Path) -> str:
    """The checkpoint's name and a digest of where its files are, how large and how old."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".jinja"))
    facts: list[Any] = [str(folder.resolve())]
    facts += [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return f"{folder.resolve().name}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:10]}"


def _once(place: Path, make: Callable[[Path], None]) -> Path:
    """`place`, made by `make` under another name first, so that what is there is whole."""
    if place.exists():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    scratch = place.with_name(f".{uuid4().hex[:8]}-{place.name}")
    try:
        make(scratch)
        if not place.exists():  # someone else may have been faster
            scratch.rename(place)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.unlink(missing_ok=True)
    return place


def _run(script: str, request: dict[str, str], shop: Workshop) -> None:
    """Let a script of this folder make a form in the peer's environment. Raises Failure."""
    shop.progress("convert", 0, 1)
    for event in events(shop.python, HERE / script, request, SILENCE):
        if event["event"] != "end":
            raise Failure(str(event.get("reason")))
    shop.progress("convert", 1, 1)
