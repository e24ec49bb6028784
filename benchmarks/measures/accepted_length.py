"""The mean accepted length of the shipped drafts on held-out prompts, by draft length.

    python benchmarks/measures/accepted_length.py [--precision fp32] [--draft-precision fp32] [--lengths 4 8 12]
        [--pard2 MODEL]

The prompts are documented functions of the standard library's held-out modules, which the pair was not trained on, up
to and including their docstrings. A mean is over all rounds of all prompts. The PARD-2 draft is measured in both modes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pard_onnx import load
from pard_onnx.benchmarks.trial import accepted_length
from pard_onnx.cli import export_job
from pard_onnx.export.job import Job
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.demo import corpus
from pard_onnx.models.hub import resolve_checkpoint
from pard_onnx.models.precision import PRECISIONS, Precision
from pard_onnx.runtime.decoding.draft_mode import DraftMode


def prompts(count: int) -> list[str]:
    """The first functions of all held-out modules, one from each module in turn, so that no module dominates."""
    heads = [[h + "\n" for h, _ in corpus.functions(m) if len(h) > 60] for m in corpus.modules() if m.held_out]
    turns = (h[i] for i in range(max(map(len, heads))) for h in heads if i < len(h))
    return list(islice(turns, count))


@dataclass(frozen=True, slots=True)
class Drafting:
    """A row of the table: a draft in one of its modes."""

    name: str
    draft: str  # what the export command takes
    mode: DraftMode = "auto"


def draftings(pard2: str) -> list[Drafting]:
    return [
        Drafting("PARD", "demo-draft"),
        Drafting("PARD-2, target-independent", pard2, "target-independent"),
        Drafting("PARD-2, target-dependent", pard2, "target-dependent"),
    ]


def exported(parent: Path, model: str, precision: Precision, layers: tuple[int, ...] = ()) -> Path:
    """An export in `parent`, made now if it does not exist; a target's with hidden states of these layers."""
    output = parent / Path(model).name
    if not output.exists():
        folder, source = resolve_checkpoint(model)
        export_job(Job(Checkpoint.open(folder), source, output, precision, feature_layers=layers, verify=False))
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--draft-precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--pard2", metavar="MODEL", default="demo-pard2-draft", help="a PARD-2 checkpoint")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4, 8, 12])
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    heads, rows = prompts(options.prompts), {}
    with tempfile.TemporaryDirectory() as scratch:
        parent = Path(scratch)
        pard = Checkpoint.open(resolve_checkpoint(options.pard2)[0]).spec.pard
        layers = pard.features.layers if pard and pard.features else ()
        target = exported(parent, "demo-target", options.precision, layers)
        for one in draftings(options.pard2):
            draft = exported(parent, one.draft, options.draft_precision)
            with load(target, draft, draft_mode=one.mode, cache_bytes=0) as pair:
                lengths = {n: accepted_length(pair, heads, options.max_new_tokens, n) for n in options.lengths}
                rows[one.name] = lengths
    if options.json:
        print(json.dumps(rows))
        return
    table = Table("draft", *(f"K = {n}" for n in options.lengths), title=f"{options.prompts} held-out prompts")
    for name, means in rows.items():
        table.add_row(name, *(f"{mean:.2f}" for mean in means.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
