"""`pard-bench`: plain decoding and drafts side by side, step costs, and other libraries on the same prompts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pard_onnx.benchmarks.measures import CONTEXT
from pard_onnx.benchmarks.peers.peer import PEERS
from pard_onnx.cli import Parser, exit_code
from pard_onnx.generation_options import add_providers, add_sampling
from pard_onnx.models.checks import DRAFT_LENGTH


def parser() -> argparse.ArgumentParser:
    out = Parser(prog="pard-bench", description="Measure plain decoding and PARD, interleaved prompt by prompt.")
    out.add_argument("--pair", nargs=2, action="append", default=[], metavar=("TARGET", "DRAFT"), help="repeatable")
    out.add_argument("--target", metavar="TARGET", help="with --draft: drafts side by side, and lookup")
    modes = "repeatable; a PARD-2 draft in both modes, unless --draft-mode names one"
    out.add_argument("--draft", action="append", default=[], metavar="DRAFT", help=modes)
    out.add_argument("--prompts", type=Path, action="append", metavar="F.jsonl", help="repeatable; default: 24 shipped")
    out.add_argument("--limit", type=int, metavar="N", help="the first N prompts of each file")
    length = out.add_mutually_exclusive_group()
    length.add_argument("--draft-length", type=int, default=DRAFT_LENGTH, metavar="K", help=f"default: {DRAFT_LENGTH}")
    length.add_argument("--sweep-k", metavar="A..B", help="every draft length from A to B, as 1..12")
    out.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    out.add_argument("--chat", action="store_true", help="prompts are messages for the chat template")
    cost = "step costs of folders; with pairs also theirs, and what they predict"
    out.add_argument("--cost", nargs="*", metavar="DIR", help=cost)
    out.add_argument("--contexts", metavar="N,N", help=f"tokens, for --cost (default: the prompts' own, or {CONTEXT})")
    out.add_argument("--peers", metavar="NAME,NAME", help=f"measure these too, or 'all': {', '.join(PEERS)}")
    out.add_argument("--peer-target", type=Path, metavar="CHECKPOINT", help="what the target was exported from")
    out.add_argument("--peer-draft", type=Path, metavar="CHECKPOINT", help="an autoregressive draft, for some modes")
    out.add_argument("--peer-models", type=Path, metavar="DIR", help="converted models (default: in the user's cache)")
    python = "a peer's own environment; repeatable"
    out.add_argument("--peer-python", action="append", default=[], metavar="NAME=PATH", help=python)
    add_sampling(out)
    add_providers(out)
    out.add_argument("--plot", type=Path, metavar="F.png", help="speed-up by K, acceptance by position, time split")
    out.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)

    def run() -> None:
        from pard_onnx.bench_measurements import measure  # with what runs models, --help would take twice as long

        measure(options)

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
