"""What a grammar adds to the time to choose tokens.

    python benchmarks/measures/grammar_cost.py FOLDER

FOLDER has the tokenizer.json of a model. The rows of logits are random but for the token that the text goes on with, so
no model is needed; compare with the time of a round of yours.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

from pard_onnx.runtime.guided.grammar import Grammar
from pard_onnx.runtime.guided.matcher import Grammars
from pard_onnx.runtime.sampling.sampler import Greedy, chooser
from pard_onnx.runtime.sampling.settings import Sampling
from pard_onnx.runtime.text.tokenizer import Text

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "tags": {"type": "array", "items": {"type": "string"}}},
    "required": ["name", "tags"],
    "additionalProperties": False,
}
DOCUMENT = {"name": "Ada Lovelace, who wrote the first program", "tags": ["mathematics", "poetry and letters"]}
REPEATS = 6
SURE = 50.0  # a logit far above the random ones


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    text = Text(parser.parse_args().folder, None)
    size = max(text.vocabulary().values()) + 1
    end = size - 1  # any id that the document has not
    start = perf_counter()
    grammars, grammar = Grammars(text.tokenizer_json, "the model", size, [end]), Grammar.json_schema(SCHEMA)
    grammars.compiled(grammar)
    print(f"{size} ids; first grammar {perf_counter() - start:.2f} s")
    ids = text.tokenize(json.dumps(DOCUMENT), add_special_tokens=False)
    rows = np.random.default_rng(0).standard_normal((9, size), np.float32)
    for count in (1, 5, 9):
        guided: list[float] = []
        plain: list[float] = []
        for _ in range(REPEATS):
            choose = chooser(Sampling(), size, 0, 0, (grammars.matcher(grammar, 0, {end}),))
            for at in range(0, len(ids) - count, count):
                logits = rows[:count].copy()
                logits[np.arange(count), ids[at : at + count]] = SURE
                drafts = ids[at : at + count - 1]
                start = perf_counter()
                choose.choose(logits, ids[:at], drafts)
                guided.append(perf_counter() - start)
                start = perf_counter()
                Greedy().choose(logits, ids[:at], drafts)
                plain.append(perf_counter() - start)
        print(f"{count} rows: {1e3 * median(guided):.2f} ms, without a grammar {1e3 * median(plain):.2f} ms")


if __name__ == "__main__":
    main()
