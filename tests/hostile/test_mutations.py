"""Mutated files are read or refused in one line, in bounded time and memory.

The default run tries some of each kind; `-m slow` tries thousands and prints how many. PARD_ONNX_INPUTS sets the number
of a slow run, PARD_ONNX_SEED the first seed.
"""

from __future__ import annotations

import json
import os
import resource
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import gguf_files
import pytest
from hostile import GRAPH, manifest_of, sealed
from mutations import mutated_bytes, mutated_json, mutated_message

from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.checkpoints.gguf.file import GgufFile
from pard_onnx.models.checkpoints.tensors import read_header
from pard_onnx.models.errors import BadArtifact, BadCheckpoint, BadInput
from pard_onnx.models.graph_file import read_graph
from pard_onnx.models.manifest import FILE_NAME, Manifest
from pard_onnx.runtime.kernels.graph import rewritten
from pard_onnx.runtime.kernels.nodes import MODEL_GRAPH, Node, as_bytes, inside

safetensors = pytest.importorskip("safetensors")
Try = Callable[[Random], None]  # tries one mutated file; raises BadInput where it is refused
Make = Callable[[Path, Path, Callable[..., Path]], Try]  # of a good artifact, a folder to write to, and `tiny`
FAST, SLOW = 120, int(os.environ.get("PARD_ONNX_INPUTS", "4000"))
SEED = int(os.environ.get("PARD_ONNX_SEED", "0"))
LONGEST, MOST_MEMORY = 10.0, 1 << 20  # seconds of one file; KiB that all together take more than before


def manifests(good: Path, folder: Path, _: object) -> Try:
    value, sizes = manifest_of(good), {path.name: path.stat().st_size for path in good.iterdir()}

    def attempt(rng: Random) -> None:
        text = sealed(mutated_json(value, rng)).encode()
        if rng.random() < 0.2:
            text = mutated_bytes(text, rng)
        (folder / FILE_NAME).write_bytes(text)
        found = Manifest.read(folder)
        assert all(name in found.sizes for name in (*found.graph_files, "tokenizer.json"))
        for name in found.sizes:  # none of them is opened that is not there
            assert (folder / name).parent == folder and "\0" not in name
        try:
            found.verify(folder)
        except BadArtifact:
            return
        raise AssertionError(f"files of {sizes} that are not there were found")

    return attempt


def graphs(good: Path, folder: Path, _: object) -> Try:
    """What is read is rewritten for the kernels, too, whose nodes name listed files alone."""
    data, sizes = (good / GRAPH).read_bytes(), Manifest.read(good).sizes

    def attempt(rng: Random) -> None:
        path = folder / GRAPH
        path.write_bytes(mutated_message(data, rng) if rng.random() < 0.9 else mutated_bytes(data, rng))
        model = read_graph(path, sizes)
        try:
            new = rewritten(model, folder)
        except (ValueError, LookupError) as error:
            raise BadArtifact(str(error)) from error
        for node in map(Node.parse, inside(inside([new or b""], MODEL_GRAPH), 1)):
            for name, file in weights_files(node):
                assert name != "weights_file" or file == str(folder / "model.onnx.data")

    return attempt


def weights_files(node: Node) -> list[tuple[str, str]]:
    attributes = inside([message_of(node)], 5)
    return [(inside([a], 1)[0].decode(), inside([a], 4)[0].decode()) for a in attributes if inside([a], 4)]


def message_of(node: Node) -> bytes:
    return as_bytes(node.encode())


def configs(_: Path, folder: Path, tiny: Callable[..., Path]) -> Try:
    families = ("qwen2", "gemma3_text", "smollm3", "mistral", "llama", "qwen3")
    made = [tiny(folder / family, family, "draft") for family in families]
    names = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
    values = {
        path / name: json.loads((path / name).read_text()) for path in made for name in names if (path / name).exists()
    }

    def attempt(rng: Random) -> None:
        path = rng.choice([path for path in values if path.name != "tokenizer.json" or rng.random() < 0.2])
        text = json.dumps(mutated_json(values[path], rng)).encode()
        path.write_bytes(text if rng.random() < 0.9 else mutated_bytes(text, rng))
        try:
            Checkpoint.open(path.parent)
        finally:
            path.write_text(json.dumps(values[path]))

    return attempt


def tensors(_: Path, folder: Path, tiny: Callable[..., Path]) -> Try:
    """What is read is what the safetensors library reads."""
    data = (tiny(folder / "tiny", layers=1) / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header, path = json.loads(data[8:end]), folder / "model.safetensors"

    def attempt(rng: Random) -> None:
        new = data
        if rng.random() < 0.6:
            text = json.dumps(mutated_json(header, rng)).encode()
            new = len(text).to_bytes(8, "little") + text + data[end:]
        else:
            new = mutated_bytes(data, rng, end)
        path.write_bytes(new)
        entries = read_header(path)
        known = all(entry.dtype in ("F32", "F16", "BF16") for entry in entries.values())
        with safetensors.safe_open(path, "numpy") if known else open(os.devnull) as file:  # noqa: PTH123
            assert not known or set(file.keys()) == set(entries)

    return attempt


def gguf(_: Path, folder: Path, tiny: Callable[..., Path]) -> Try:
    path = folder / "model.gguf"
    gguf_files.write(path, tiny(folder / "tiny", "llama", layers=1), "Q4_0")
    data = path.read_bytes()
    end = min(tensor.offset for tensor in GgufFile.read(path).tensors.values())

    def attempt(rng: Random) -> None:
        path.write_bytes(mutated_bytes(data, rng, rng.choice((64, 1000, end))))
        Checkpoint.open(path)

    return attempt


KINDS: dict[str, tuple[Make, type[BadInput]]] = {
    "manifests": (manifests, BadArtifact),
    "graphs": (graphs, BadArtifact),
    "configs": (configs, BadCheckpoint),
    "tensors": (tensors, BadCheckpoint),
    "gguf": (gguf, BadCheckpoint),
}


def run(kind: str, count: int, good: Path, folder: Path, tiny: Any) -> Counter[str]:
    """Try so many files of a kind; how many were read and how many refused."""
    make, error = KINDS[kind]
    attempt, results, before = make(good, folder, tiny), Counter[str](), memory()
    for seed in range(SEED, SEED + count):
        start = time.perf_counter()
        try:
            attempt(Random(f"{kind} {seed}"))
        except error as refused:
            assert "\n" not in str(refused) and len(str(refused)) < 20_000, (seed, str(refused)[:1000])
            results["refused"] += 1
        except Exception as escaped:
            raise AssertionError(f"{kind} {seed}: {type(escaped).__name__}: {escaped}") from escaped
        else:
            results["read"] += 1
        assert time.perf_counter() - start < LONGEST, seed
    assert memory() - before < MOST_MEMORY
    return results


def memory() -> int:
    """The largest resident memory so far, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.filterwarnings("ignore::pard_onnx.models.errors.PardWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_some_of_each_kind(kind: str, good: Path, tmp_path: Path, tiny: Callable[..., Path]) -> None:
    results = run(kind, FAST, good, tmp_path, tiny)
    assert results["refused"] > FAST // 10, results


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore::pard_onnx.models.errors.PardWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_each_kind(
    kind: str, good: Path, tmp_path: Path, tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    results = run(kind, SLOW, good, tmp_path, tiny)
    with capsys.disabled():
        print(f"\n{kind}: {SLOW} files, {results['read']} read, {results['refused']} refused")
