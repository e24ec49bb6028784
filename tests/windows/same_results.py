"""Graphs with this package's operators, and the shipped pair: results of one system that another one compares with.

    python same_results.py write FOLDER [PAIR]     here: graphs, their inputs and outputs, the pair's texts
    python same_results.py compare FOLDER [PAIR]   there: the same ones, bit for bit; ends with an error for others

PAIR is a folder with the exported demo-target-int4 and demo-draft-int4. Inputs are stored, since two systems need not
have the same sines.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))  # the embedded Python ignores PYTHONPATH

import literal_attention
import literal_matmul
from one_node import attention_feeds, attention_model, matmul_model, session

from pard_onnx import load
from pard_onnx.runtime import kernels

PROMPTS = ("def fibonacci(n):\n", "class Stack:\n    def push", "import os\n", "€ ü 汉字 🙂\n")
LENGTHS = (0, 3, 8, "auto")  # of drafts
TOKENS = 48


def cases() -> Iterator[tuple[onnx.ModelProto, dict[str, Any]]]:
    """Graphs of one node with their inputs."""
    rng = np.random.default_rng(20)
    for bits in (4, 8):
        for block in (32, 64, 128):
            for zeros in (False, True):
                matrix = literal_matmul.random_matrix(rng, 70, 3 * block, bits, block, zeros, bias=True)
                for rows in (1, 2, 9, 70):
                    x = rng.standard_normal((1, rows, matrix.k)).astype(np.float32)
                    yield matmul_model(matrix, "pard_onnx"), {"A": x}
    for heads, kv_heads, dim in ((12, 2, 128), (14, 2, 64), (3, 1, 16)):
        for rows, past in ((1, 0), (1, 100), (9, 256), (40, 0)):
            step = literal_attention.random_step(rng, rows, past, heads, kv_heads, dim, spare=20)
            yield attention_model(step, "pard_onnx"), attention_feeds(step)


def isas() -> list[str]:
    library = kernels.load()
    assert library is not None, "the kernels are not built"
    return [name for name in kernels.ISAS if library.pard_select_isa(name.encode())]


def outputs(graph: onnx.ModelProto, feeds: dict[str, Any], isa: str) -> list[Any]:
    library = kernels.load()
    assert library is not None and library.pard_select_isa(isa.encode())
    found: list[Any] = session(graph).run(None, feeds)
    return found


def texts(pair_folder: Path) -> list[list[Any]]:
    out: list[list[Any]] = []
    with load(pair_folder / "demo-target-int4", pair_folder / "demo-draft-int4", provider="cpu") as pair:
        for prompt in PROMPTS:
            for length in LENGTHS:
                result = pair.generate(prompt, max_new_tokens=TOKENS, draft_length=length)
                out.append([prompt, length, result.text, result.stats.exact])
    return out


def write(folder: Path, pair_folder: Path | None) -> None:
    for number, (graph, feeds) in enumerate(cases()):
        (folder / f"{number}.onnx").write_bytes(graph.SerializeToString())
        np.savez(folder / f"{number}-in.npz", **feeds)
        np.savez(folder / f"{number}-out.npz", *outputs(graph, feeds, kernels.PORTABLE))
    if pair_folder:
        (folder / "texts.json").write_text(json.dumps(texts(pair_folder)), encoding="utf-8")


def compare(folder: Path, pair_folder: Path | None) -> int:
    """The number of results that were compared. AssertionError for one that differs."""
    count = 0
    for graph_file in sorted(folder.glob("*.onnx")):
        graph = onnx.load(graph_file)
        feeds = dict(np.load(folder / f"{graph_file.stem}-in.npz"))
        expected = list(np.load(folder / f"{graph_file.stem}-out.npz").values())
        for isa in isas():
            for found, wanted in zip(outputs(graph, feeds, isa), expected, strict=True):
                assert found.tobytes() == wanted.tobytes(), (graph_file.name, isa)
                count += 1
    if pair_folder:
        wanted_texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
        for found_text, wanted_text in zip(texts(pair_folder), wanted_texts, strict=True):
            assert found_text == wanted_text
            count += 1
    return count


if __name__ == "__main__":
    what, folder, *pair = sys.argv[1:]
    if what == "write":
        write(Path(folder), Path(pair[0]) if pair else None)
    else:
        print(f"{compare(Path(folder), Path(pair[0]) if pair else None)} results are the same")
