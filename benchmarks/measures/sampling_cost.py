"""The time to choose a token from a row of logits, by sampling settings.

    python benchmarks/measures/sampling_cost.py [--vocabulary 151936] [--context 4096] [--json]

There are rows of two kinds. `peaked` rows have probabilities like those of a language, rank ** -1.5, so that 0.95 of
the mass is in a few hundred ids. `flat` rows are normal logits with a standard deviation of 1, in which nearly every id
counts: the worst case of top_p. The time is for one row; a round chooses from one row for each of its tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from pard_onnx.runtime.sampling.sampler import chooser
from pard_onnx.runtime.sampling.settings import Sampling

PENALTIES: dict[str, Any] = {
    "repetition_penalty": 1.1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "logit_bias": {7: -1.0},
}
DRAWN: dict[str, dict[str, Any]] = {
    "temperature 0.8": {},
    "top_k 50": {"top_k": 50},
    "top_p 0.95": {"top_p": 0.95},
    "min_p 0.05": {"min_p": 0.05},
    "top_k 50, top_p 0.95": {"top_k": 50, "top_p": 0.95},
    "top_p 0.95, min_p 0.05": {"top_p": 0.95, "min_p": 0.05},
    "top_k 50, top_p 0.95, min_p 0.05": {"top_k": 50, "top_p": 0.95, "min_p": 0.05},
}


def settings() -> Iterator[tuple[str, Sampling]]:
    """Each combination of filters, without and with penalties and a bias."""
    yield "greedy", Sampling()
    yield "greedy, penalties", Sampling(**PENALTIES)
    for name, filters in DRAWN.items():
        yield name, Sampling(temperature=0.8, **filters)
        yield f"{name}, penalties", Sampling(temperature=0.8, **filters, **PENALTIES)


def logits(kind: str, rows: int, vocabulary: int) -> NDArray[np.float32]:
    """Random rows, [rows, vocabulary]."""
    chance = np.random.default_rng(0)
    if kind == "flat":
        return chance.normal(size=(rows, vocabulary)).astype(np.float32)
    ranked = -1.5 * np.log(np.arange(1, vocabulary + 1))
    return np.stack([chance.permutation(ranked) for _ in range(rows)]).astype(np.float32)


def milliseconds(sampling: Sampling, rows: NDArray[np.float32], context: list[int], repeat: int) -> float:
    """The median time for one row, after the context's tokens were counted, as in all rounds but the first."""
    chosen = chooser(sampling, rows.shape[1], len(context) // 2, 0)
    chosen.choose(rows[:1], context, ())
    times = []
    for i in range(repeat):
        row = rows[i % len(rows)][None]
        start = perf_counter()
        chosen.choose(row, context, ())
        times.append(perf_counter() - start)
    return 1000 * median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--context", type=int, default=4096, help="tokens, half of them the prompt's")
    parser.add_argument("--repeat", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    kinds = {kind: logits(kind, 8, options.vocabulary) for kind in ("peaked", "flat")}
    context = np.random.default_rng(1).integers(0, options.vocabulary, options.context).tolist()
    found = {
        name: {kind: milliseconds(sampling, rows, context, options.repeat) for kind, rows in kinds.items()}
        for name, sampling in settings()
    }
    if options.json:
        print(json.dumps(found))
        return
    table = Table("settings", *(f"{kind}, ms" for kind in kinds), title=f"one row of {options.vocabulary} logits")
    for name, times in found.items():
        table.add_row(name, *(f"{times[kind]:.2f}" for kind in kinds))
    Console().print(table)


if __name__ == "__main__":
    main()
