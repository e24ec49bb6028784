"""The time of a round outside of ONNX Runtime's runs, and the functions in which it is spent.

    python benchmarks/measures/overhead.py --pair TARGET DRAFT [--draft-length 7] [--max-new-tokens 128] [--json]

The run calls of the sessions are timed, and the rest of a round's time is overhead. A second pass under cProfile shows
the functions. Times under cProfile are longer than real ones, so only their shares are reported.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

from rich.console import Console

from pard_onnx.benchmarks.display import new_table
from pard_onnx.benchmarks.trial import SHIPPED, read_prompts
from pard_onnx.cli import Parser, exit_code
from pard_onnx.models.checks import DRAFT_LENGTH
from pard_onnx.models.errors import BadInput
from pard_onnx.runtime.pair import Pair, load

RUN = "run_with_iobinding"
LINES = 12
NAME = 60  # characters of a function's name and place


class Timed:
    """An ONNX Runtime session whose runs are timed."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.seconds = 0.0

    def run_with_iobinding(self, binding: Any) -> None:
        start = perf_counter()
        self._session.run_with_iobinding(binding)
        self.seconds += perf_counter() - start


@dataclass(frozen=True, slots=True)
class Overhead:
    """The mean round, without the first ones of each text."""

    rounds: int
    round_ms: float
    run_ms: float  # in ONNX Runtime's runs
    overhead_ms: float  # outside of them
    share: float  # of the overhead in the round
    functions: tuple[tuple[str, float], ...]  # with the share of the overhead in each function itself


def measure_overhead(pair: Pair, prompts: Sequence[str], draft_length: int, max_new_tokens: int) -> Overhead:
    pair.generate(prompts[0], max_new_tokens=max_new_tokens, draft_length=draft_length)  # warm-up
    timed = add_timers(pair)
    seconds = runs = 0.0
    rounds = 0
    for prompt in prompts:
        with pair.stream(prompt, max_new_tokens=max_new_tokens, draft_length=draft_length) as stream:
            if next(stream, None) and next(stream, None):  # the target's prefill, and the draft's
                start, before = perf_counter(), sum(t.seconds for t in timed)
                rounds += sum(1 for _ in stream)
                seconds += perf_counter() - start
                runs += sum(t.seconds for t in timed) - before
    if not rounds:
        raise BadInput("every text ended within its first round; raise --max-new-tokens or name other prompts")
    functions = profile_functions(pair, prompts, draft_length, max_new_tokens)
    per_round = 1000 / rounds
    return Overhead(
        rounds, seconds * per_round, runs * per_round, (seconds - runs) * per_round, 1 - runs / seconds, functions
    )


def add_timers(pair: Pair) -> list[Timed]:
    """Put a timer in front of each session of a pair."""
    sessions: list[Any] = [model.session for model in pair.engine.models if model]
    out = []
    for session in sessions:
        session._session = Timed(session._session)
        out.append(session._session)
    return out


def profile_functions(
    pair: Pair, prompts: Sequence[str], draft_length: int, max_new_tokens: int
) -> tuple[tuple[str, float], ...]:
    profiler = cProfile.Profile()
    with profiler:
        for prompt in prompts:
            pair.generate(prompt, max_new_tokens=max_new_tokens, draft_length=draft_length)
    rows: dict[Any, Any] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    own = {function_name(key): row[2] for key, row in rows.items() if RUN not in key[2]}
    total = sum(own.values())
    ranked = sorted(own.items(), key=lambda item: -item[1])[:LINES]
    return tuple((name, seconds / total) for name, seconds in ranked)


def function_name(key: tuple[str, int, str]) -> str:
    path, line, function = key
    return function if path == "~" else f"{path.rsplit('/', 1)[-1]}:{line} {function}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="overhead.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", nargs=2, required=True, metavar=("TARGET", "DRAFT"))
    parser.add_argument("--draft-length", type=int, default=DRAFT_LENGTH, metavar="K")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    return exit_code(lambda: report(options))


def report(options: argparse.Namespace) -> None:
    with load(*options.pair, cache_bytes=0) as pair:
        found = measure_overhead(pair, read_prompts(SHIPPED, 8).prompts, options.draft_length, options.max_new_tokens)
    if options.json:
        print(json.dumps(asdict(found)))
        return
    out = new_table(
        f"{found.rounds} rounds of {found.round_ms:.2f} ms: {found.run_ms:.2f} in ONNX Runtime's runs, "
        f"{found.overhead_ms:.3f} ({100 * found.share:.2f} %) outside",
        ("where the time outside goes (profiled)", "%"),
    )
    for name, share in found.functions:
        out.add_row(name[-NAME:], f"{100 * share:.0f}")
    Console().print(out)


if __name__ == "__main__":
    sys.exit(main())
