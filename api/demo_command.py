"""`pard-demo`: the shipped pair, run by plain decoding and by PARD, side by side."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pard_onnx.cli import Parser, exit_code, exported_once
from pard_onnx.generation_options import whole_or_auto
from pard_onnx.models import demo
from pard_onnx.models.checks import AUTO, DRAFT_LIMIT, require_whole
from pard_onnx.models.errors import Failure
from pard_onnx.models.precision import PRECISIONS, Precision

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from pard_onnx.runtime.pair import Pair
    from pard_onnx.runtime.result import Chunk, Result

DRAFTED = "bold green"
SHIPPED: Precision = "int4"  # of the exported pair in the package


@dataclass(frozen=True, slots=True)
class Run:
    """The results of plain decoding and of PARD on one prompt."""

    prompt: str
    plain: Result
    pard: Result
    chunks: tuple[Chunk, ...]


def parser() -> argparse.ArgumentParser:
    out = Parser(
        prog="pard-demo",
        description="Generate with the shipped pair, by plain decoding and by PARD.",
    )
    out.add_argument("--precision", choices=PRECISIONS, default=SHIPPED, help=f"of the target (default: {SHIPPED})")
    out.add_argument("--draft-precision", choices=PRECISIONS, default=SHIPPED, help=f"default: {SHIPPED}")
    out.add_argument("--max-new-tokens", type=int, default=96, metavar="N")
    out.add_argument("--draft-length", type=whole_or_auto, default=AUTO, metavar="K", help="default: auto")
    out.add_argument("--output", type=Path, metavar="DIR", help="export the pair, and keep the folders here")
    out.add_argument("--json", action="store_true", help="one JSON object instead of text and table")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    require_whole("--max-new-tokens", options.max_new_tokens, 2)  # rates are of the tokens after the first
    if options.draft_length != AUTO:
        require_whole("--draft-length", options.draft_length, 1, DRAFT_LIMIT)
    from rich.console import Console

    console = Console(highlight=False, quiet=options.json)
    runs = []
    for one in compared(options):
        runs.append(one)
        show(console, one)
    conclude(console, runs)
    if options.json:
        print(json.dumps(summary(runs)))


def compared(options: argparse.Namespace) -> Iterator[Run]:
    """All prompts, decoded both ways."""
    from pard_onnx.runtime.pair import load

    with tempfile.TemporaryDirectory(prefix="pard-demo-") as scratch:
        target, draft = folders(options, Path(scratch))
        with load(target, draft, cache_bytes=0) as pair:  # each way reads the whole prompt
            for length in (0, options.draft_length):
                pair.generate("def", max_new_tokens=16, draft_length=length)  # warm-up
            for prompt in demo.prompts():
                yield compare(pair, prompt, options)


def folders(options: argparse.Namespace, scratch: Path) -> tuple[Path, Path]:
    """The exported target and draft: those of the package, or new exports where the options ask for others."""
    found = []
    for name, shipped, precision in (
        ("demo-target", demo.EXPORTED_TARGET, options.precision),
        ("demo-draft", demo.EXPORTED_DRAFT, options.draft_precision),
    ):
        as_shipped = precision == SHIPPED and options.output is None
        found.append(shipped if as_shipped else exported(name, options.output or scratch, precision))
    return found[0], found[1]


def exported(name: str, parent: Path, precision: Precision) -> Path:
    """The exported folder of a shipped model in `parent`; exported now if it does not exist."""
    from pard_onnx.models.checkpoints.checkpoint import Checkpoint
    from pard_onnx.models.hub import resolve_checkpoint

    folder, source = resolve_checkpoint(name)
    return exported_once(Checkpoint.open(folder), source, parent / f"{name}-{precision}", precision)


def compare(pair: Pair, prompt: str, options: argparse.Namespace) -> Run:
    plain = pair.generate(prompt, max_new_tokens=options.max_new_tokens, draft_length=0)
    with pair.stream(prompt, max_new_tokens=options.max_new_tokens, draft_length=options.draft_length) as stream:
        chunks = tuple(stream)
    if stream.result.tokens != plain.tokens:
        raise Failure(f"PARD and plain decoding differ on {prompt!r}; please report this")
    return Run(prompt, plain, stream.result, chunks)


def show(console: Console, run: Run) -> None:
    """Print the text, with the draft's tokens in colour."""
    from rich.text import Text

    text = Text(run.prompt, style="dim")
    for chunk in run.chunks:
        flags = [*chunk.drafted, *[False] * (len(chunk.pieces) - len(chunk.drafted))]
        for piece, drafted in zip(chunk.pieces, flags, strict=True):
            text.append(piece, style=DRAFTED if drafted else "")
    console.rule(style="dim")
    console.print(text)


def conclude(console: Console, runs: Sequence[Run]) -> None:
    """Print the table of all prompts, and what it shows."""
    console.print(table(runs))
    console.print(explanation(runs))


def table(runs: Sequence[Run]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    out = Table(box=SIMPLE_HEAD)
    for name in ("prompt", "tokens", "plain\ntok/s", "PARD\ntok/s", "speed-up", "accepted"):
        out.add_column(name, justify="left" if name == "prompt" else "right", no_wrap=True)
    for run in runs:
        out.add_row(Text(run.prompt.split("(")[0].split()[-1]), *cells(facts([run])))
    out.add_section()
    out.add_row("all", *cells(facts(runs)))
    return out


def explanation(runs: Sequence[Run]) -> str:
    """What the table shows, and why a prompt is slower with the draft where one is."""
    lines = ["Same tokens both ways; green above: from the draft; accepted: tokens a round."]
    slower = [run for run in runs if facts([run])["speed_up"] < 1]
    if slower:
        found = facts(slower)
        cost = found["mean_accepted"] / found["speed_up"]
        lines.append(
            f"Below 1x ({len(slower)} of {len(runs)} prompts): a round took as long as {cost:.1f} plain steps and "
            f"gave {found['mean_accepted']:.1f} tokens. The draft guesses little of these texts, and the steps of "
            "models as small as these are mostly overhead, which a large target does not have; "
            "benchmarks/README.md has its numbers."
        )
    return "\n".join(lines)


def cells(found: dict[str, Any]) -> tuple[str, ...]:
    return (
        str(found["new_tokens"]),
        f"{found['plain_tokens_per_second']:.0f}",
        f"{found['pard_tokens_per_second']:.0f}",
        f"{found['speed_up']:.2f}x",
        f"{found['mean_accepted']:.2f}",
    )


def facts(runs: Sequence[Run]) -> dict[str, Any]:
    """Numbers over all runs; rates are all tokens over all seconds, not means of rates."""
    plain, pard = rate([run.plain for run in runs]), rate([run.pard for run in runs])
    accepted = [count for run in runs for count in run.pard.stats.accepted]
    return {
        "new_tokens": sum(run.pard.stats.new_tokens for run in runs),
        "plain_tokens_per_second": plain,
        "pard_tokens_per_second": pard,
        "speed_up": pard / plain if plain else 0.0,
        "mean_accepted": sum(accepted) / len(accepted) if accepted else 0.0,
    }


def rate(results: Sequence[Result]) -> float:
    """Tokens a second, without the first token and the time to it."""
    seconds = sum(r.stats.seconds.total - r.stats.time_to_first_token for r in results)
    return sum(max(0, r.stats.new_tokens - 1) for r in results) / seconds if seconds else 0.0


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    return {
        "prompts": [{"prompt": run.prompt, "text": run.pard.text} | facts([run]) for run in runs],
        "all": facts(runs),
    }


if __name__ == "__main__":
    sys.exit(main())
