"""The cost of a draft's step with and without each of its outputs, measured interleaved in one run.

    python benchmarks/measures/draft_outputs.py --draft DIR [--tokens 3] [--draft-length 8] [--past 256]

The runtime binds ids and probabilities. The rows of logits are always computed, but copied only if they are bound.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime as ort
from rich.console import Console
from rich.table import Table

from pard_onnx.models.manifest import GRAPH, Manifest

CASES = {
    "ids": ("draft_ids",),
    "ids, probabilities": ("draft_ids", "draft_probabilities"),
    "ids, probabilities, logits": ("draft_ids", "draft_probabilities", "logits"),
}


def bound(session: Any, manifest: Manifest, outputs: tuple[str, ...], tokens: int, k: int, past: int) -> Any:
    """An IO binding for one step of `tokens` tokens after `past`, which writes the KV cache in place."""
    binding, value = session.io_binding(), ort.OrtValue.ortvalue_from_numpy
    shape = (1, manifest.spec.kv_heads, manifest.kv_rows, manifest.spec.head_dim)
    for layer in range(manifest.spec.layers):
        for part in ("key", "value"):
            cache = value(np.zeros(shape, manifest.kv_dtype))
            binding.bind_ortvalue_input(f"past_key_values.{layer}.{part}", cache)
            binding.bind_ortvalue_output(f"present.{layer}.{part}", cache)
    binding.bind_ortvalue_input("input_ids", value(np.arange(100, 100 + tokens)[None]))
    binding.bind_ortvalue_input("attention_mask", value(np.ones((1, past + tokens), np.int64)))
    binding.bind_ortvalue_input("draft_length", value(np.array([k])))
    arrays = {
        "draft_ids": np.empty((1, k), np.int64),
        "draft_probabilities": np.empty((1, k), np.float32),
        "logits": np.empty((1, k, manifest.columns), np.float32),
    }
    for name in outputs:
        binding.bind_ortvalue_output(name, value(arrays[name]))
    return binding


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draft", type=Path, required=True, help="a folder that pard-export has written")
    parser.add_argument("--tokens", type=int, default=3)
    parser.add_argument("--draft-length", type=int, default=8)
    parser.add_argument("--past", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=60)
    options = parser.parse_args()
    manifest = Manifest.read(options.draft)
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    session = ort.InferenceSession(options.draft / GRAPH, settings, providers=["CPUExecutionProvider"])
    bindings = {
        name: bound(session, manifest, outputs, options.tokens, options.draft_length, options.past)
        for name, outputs in CASES.items()
    }
    times: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(options.repeat):
        for name, binding in bindings.items():
            start = perf_counter()
            session.run_with_iobinding(binding)
            times[name].append(perf_counter() - start)
    table = Table("outputs bound", "ms", title=f"{options.tokens} tokens and {options.draft_length - 1} masks")
    for name, seconds in times.items():
        table.add_row(name, f"{1000 * median(seconds):.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
