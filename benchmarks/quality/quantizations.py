"""Exported folders beside llama.cpp's quantizations of the same floats: perplexity, bytes, and times of steps.

Everything is measured in one process: the same tokens, and steps that take turns. Needs llama-cpp-python and gguf.
The quantized GGUF files are kept in --cache and made again only if they are missing.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import exp
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from pard_onnx.benchmarks.measures.step_costs import measure_interleaved
from pard_onnx.benchmarks.peers.forms import write_gguf
from pard_onnx.export.verify.perplexity import losses_of
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.checkpoints.vocabulary import load_tokenizer
from pard_onnx.models.manifest import Manifest
from pard_onnx.runtime.model import session_class
from pard_onnx.runtime.providers.table import CPU
from pard_onnx.runtime.providers.threads import Threads

sys.path.insert(0, str(Path(__file__).parents[1] / "peers"))  # the worker imports its neighbours by plain names
from llama_cpp_worker import Model as LlamaCpp  # type: ignore[import-not-found]

TYPES = ("Q4_0", "Q4_K_M", "Q5_K_M", "Q8_0")
MODULES = ("shutil", "difflib", "calendar", "tarfile", "argparse", "decimal")  # of the standard library
WINDOW = 512  # tokens, from an empty KV cache
WINDOWS = 6  # of source, and as many of prose
READ = 64  # tokens of a step while perplexity is measured
CONTEXT, WIDTHS, REPEATS, BEFORE = 256, (1, 5, 9), 15, 4  # of timed steps
Ids = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Quantization:
    """One quantized model. loss: by which its perplexity is above that of the floats; None if it was not measured."""

    name: str
    megabytes: float
    loss: float | None
    milliseconds: dict[int, float]  # of a step, by its tokens


@dataclass(frozen=True, slots=True)
class Runner:
    """A model as two functions: `read` gives the logits of tokens after an empty cache, `step` times one step."""

    name: str
    nbytes: int
    read: Callable[[Ids], Floats]
    step: Callable[[int], None]  # of so many tokens after CONTEXT others


def exported(folder: Path, threads: int) -> Runner:
    manifest = Manifest.read(folder)
    session = session_class(manifest)(folder, manifest, CPU, Threads(threads))

    def read(ids: Ids) -> Floats:
        session.rollback(0)
        steps = [ids[start : start + READ].tolist() for start in range(0, len(ids), READ)]
        return np.concatenate([session.step(step, len(step)).logits.copy() for step in steps])

    def step(width: int) -> None:
        if session.length < CONTEXT:
            session.rollback(0)
            session.step(list(range(CONTEXT)), 1)
        session.rollback(CONTEXT)
        session.step(list(range(width)), width)

    name = manifest.quantization.recipe if manifest.quantization else manifest.precision
    if manifest.source.quantization:
        name += f", integers of {manifest.source.quantization}"
    return Runner(f"pard-onnx {name}", sum(path.stat().st_size for path in folder.iterdir()), read, step)


def llama_cpp(path: Path, name: str, threads: int) -> Runner:
    model = LlamaCpp(str(path), threads, WINDOW + max(WIDTHS))

    def read(ids: Ids) -> Floats:
        model.rewind(0)
        return np.stack([row.copy() for row in model.feed(ids.tolist(), len(ids))])

    def step(width: int) -> None:
        if len(model.cached) < CONTEXT:
            model.rewind(0)
            model.feed(list(range(CONTEXT)), 1)
        model.rewind(CONTEXT)
        model.feed(list(range(width)), width)

    return Runner(f"llama.cpp {name}", path.stat().st_size, read, step)


# In the place of llama.cpp's log, which has thousands of lines
SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


def quantized_files(checkpoint: Path, cache: Path, names: Sequence[str], threads: int) -> Iterator[tuple[str, Path]]:
    """llama.cpp's own quantizations of the checkpoint, by the names of their types."""
    import llama_cpp as library

    library.llama_log_set(SILENT, None)
    floats = cache / "floats.gguf"
    for name in names:
        path = cache / f"{name}.gguf"
        if not path.exists():
            cache.mkdir(parents=True, exist_ok=True)
            part = cache / "part.gguf"
            if not floats.exists():
                write_gguf(Checkpoint.open(checkpoint), part, "f32")
                part.rename(floats)
            options = library.llama_model_quantize_default_params()
            options.ftype, options.nthread = getattr(library, f"LLAMA_FTYPE_MOSTLY_{name}"), threads
            if library.llama_model_quantize(str(floats).encode(), str(part).encode(), ctypes.byref(options)):
                raise SystemExit(f"llama.cpp cannot quantize {floats} to {name}")
            part.rename(path)
        yield name, path


def windows(checkpoint: Path) -> list[Ids]:
    """Windows of the standard library's source and of Python's reference."""
    tokenizer = load_tokenizer(checkpoint / "tokenizer.json")
    source = "".join(Path(str(__import__(module).__file__)).read_text(encoding="utf-8") for module in MODULES)
    prose = " ".join(topics.topics[name] for name in sorted(topics.topics))
    found = []
    for text in (source, prose):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        starts = np.linspace(0, len(ids) - WINDOW, WINDOWS).astype(int)
        found += [np.array(ids[start : start + WINDOW]) for start in starts]
    return found


def mean_loss(read: Callable[[Ids], Floats], texts: Sequence[Ids]) -> float:
    return float(np.concatenate([losses_of(read(ids)[:-1], ids[1:]) for ids in texts]).mean())


def floats_of(checkpoint: Path) -> Callable[[Ids], Floats]:
    """The checkpoint in float32, by transformers."""
    import torch

    from pard_onnx.export.verify.reference import load_reference

    reference = load_reference(Checkpoint.open(checkpoint))
    return lambda ids: reference(torch.from_numpy(ids[None])).numpy()[0]


def measure(options: argparse.Namespace) -> list[Quantization]:
    makers: list[Callable[[], Runner]] = [partial(exported, folder, options.threads) for folder in options.exports]
    for name, path in quantized_files(options.checkpoint, options.cache, options.types, options.threads):
        makers.append(partial(llama_cpp, path, name, options.threads))
    texts = [] if options.no_perplexity else windows(options.checkpoint)
    base = mean_loss(floats_of(options.checkpoint), texts) if texts else 0.0
    if texts:
        print(f"float32: perplexity {exp(base):.3f} of {len(texts)} windows of {WINDOW} tokens", file=sys.stderr)
    runners = [make() for make in makers]
    losses = [exp(mean_loss(runner.read, texts) - base) - 1 if texts else None for runner in runners]
    costs = measure_interleaved([runner.step for runner in runners], WIDTHS, REPEATS, BEFORE)
    return [
        Quantization(
            runner.name,
            round(runner.nbytes / 1e6, 1),
            loss if loss is None else round(loss, 4),
            {width: round(1e3 * seconds, 2) for width, seconds in cost.points},
        )
        for runner, loss, cost in zip(runners, losses, costs, strict=True)
    ]


def show(found: Sequence[Quantization]) -> None:
    table = Table("model", "MB", "perplexity", *(f"{width} tokens" for width in WIDTHS))
    for one in found:
        loss = "" if one.loss is None else f"{one.loss:+.1%}"
        table.add_row(one.name, f"{one.megabytes}", loss, *(f"{one.milliseconds[width]} ms" for width in WIDTHS))
    Console().print(table)


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        "python benchmarks/quality/quantizations.py", description=str(__doc__).splitlines()[0]
    )
    out.add_argument("--checkpoint", type=Path, required=True, help="a folder in floats, of which all others are made")
    out.add_argument("--exports", type=Path, nargs="*", default=[], help="folders that pard-export made of it")
    out.add_argument("--types", nargs="*", default=TYPES, help="of llama.cpp")
    out.add_argument("--cache", type=Path, required=True, help="folder of the GGUF files")
    out.add_argument("--no-perplexity", action="store_true", help="times and bytes only, for replicas")
    out.add_argument("--threads", type=int, default=2)
    out.add_argument("--json", action="store_true")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    found = measure(options)
    if options.json:
        values: list[dict[str, Any]] = [asdict(one) for one in found]
        print(json.dumps(values, indent=2))
    else:
        show(found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
