"""The mean accepted length of the shipped pair on held-out prompts, by draft length.

    python benchmarks/measures/accepted_length.py [--precision fp32] [--draft-precision fp32] [--lengths 4 8 12]

The prompts are documented functions of the standard library's held-out modules, which the pair was not trained on, up
to and including their docstrings. A mean is over all rounds of all prompts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pard_onnx import load
from pard_onnx.benchmarks.trial import accepted_length
from pard_onnx.cli import exported_demo_model
from pard_onnx.models.demo import corpus
from pard_onnx.models.precision import PRECISIONS


def prompts(count: int) -> list[str]:
    """The first functions of all held-out modules, one from each module in turn, so that no module dominates."""
    heads = [[h + "\n" for h, _ in corpus.functions(m) if len(h) > 60] for m in corpus.modules() if m.held_out]
    turns = (h[i] for i in range(max(map(len, heads))) for h in heads if i < len(h))
    return list(islice(turns, count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--draft-precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4, 8, 12])
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        target = exported_demo_model("demo-target", Path(scratch), options.precision)
        draft = exported_demo_model("demo-draft", Path(scratch), options.draft_precision)
        with load(target, draft, cache_bytes=0) as pair:
            heads = prompts(options.prompts)
            rows = {n: accepted_length(pair, heads, options.max_new_tokens, n) for n in options.lengths}
    if options.json:
        print(json.dumps(rows))
        return
    table = Table("K", "mean accepted length", title=f"{options.prompts} held-out prompts")
    for length, mean in rows.items():
        table.add_row(str(length), f"{mean:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
