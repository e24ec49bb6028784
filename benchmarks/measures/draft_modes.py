"""The time of a PARD-2 draft's rounds in both modes, measured interleaved in one run: what reading the target costs.

    python benchmarks/measures/draft_modes.py --pair TARGET DRAFT [--draft-length 8] [--accepted 5] [--context 256]

Both modes run the loop of this package on one pair, a round of each in turn, with KV caches of their own. Each round
commits as many tokens as --accepted says, whatever the models propose, so that replicas of any weights do. What
target-dependent mode adds is the target's output of hidden states, the copies of features, and the draft's projection.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from pard_onnx.benchmarks.display import new_table
from pard_onnx.cli import Parser, exit_code
from pard_onnx.models.checks import DRAFT_LENGTH, require_whole
from pard_onnx.models.errors import BadInput
from pard_onnx.runtime.decoding.draft_mode import DEPENDENT, INDEPENDENT
from pard_onnx.runtime.decoding.drafter import PardDrafter
from pard_onnx.runtime.decoding.loop import Settings, Step, decode
from pard_onnx.runtime.engine import Engine
from pard_onnx.runtime.model import SessionLock
from pard_onnx.runtime.pair import load
from pard_onnx.runtime.run import DraftSeat, TargetSeat
from pard_onnx.runtime.sampling.edits import Logits
from pard_onnx.runtime.sampling.sampler import Greedy
from pard_onnx.runtime.sessions.session import do_nothing
from pard_onnx.runtime.tuning.steps import ANY

WARM_UP = 3  # rounds; in the first the draft reads the prompt
RESAMPLES = 2000
PARTS = ("round", "draft", "verify", "other")


class FixedAcceptance:
    """Chooses as greedy decoding does, which takes its time, and then accepts the same number of drafts each round."""

    def __init__(self, accepted: int) -> None:
        self._accepted = accepted  # tokens a round, the target's own included

    def choose(self, rows: Logits, committed: Sequence[int], drafts: Sequence[int]) -> list[int]:
        own = Greedy().choose(rows, committed, drafts)
        if len(drafts) < self._accepted:
            return [*drafts, own[-1]]
        return [*drafts[: self._accepted - 1], drafts[self._accepted - 1] ^ 1]  # another id than the draft


@dataclass(frozen=True, slots=True)
class ModeTimes:
    """The median round of one mode, in milliseconds."""

    mode: str
    round: float
    draft: float
    verify: float
    other: float


@dataclass(frozen=True, slots=True)
class Cost:
    """What target-dependent mode adds to a round."""

    rounds: int
    modes: tuple[ModeTimes, ModeTimes]  # target-dependent, target-independent
    more_ms: float  # the median of the differences of rounds that followed each other
    share: float  # of that in a round of target-independent mode
    low: float  # bounds of the share's 95 % interval, a bootstrap over rounds
    high: float


def measure(engine: Engine, k: int, accepted: int, context: int, repeat: int) -> Cost:
    """Rounds of both modes in turn; each mode is the first of a turn as often as the other."""
    settings = Settings(
        max_new_tokens=(repeat + WARM_UP + 1) * accepted, draft_length=k, capacity=engine.capacity,
        widths=engine.exact_widths or ANY,
    )  # fmt: skip
    runs = [rounds(engine, mode, settings, accepted, context) for mode in (DEPENDENT, INDEPENDENT)]
    for _ in range(WARM_UP):
        for run in runs:
            next(run)
    found = np.zeros((2, repeat, len(PARTS)))  # seconds
    for turn in range(repeat):
        for which in (0, 1) if turn % 2 else (1, 0):
            found[which, turn] = timed(runs[which])
    for run in runs:
        run.close()
    return summary(1000 * found)


def rounds(engine: Engine, mode: str, settings: Settings, accepted: int, context: int) -> Generator[Step, None, None]:
    """The loop in one mode, on a sequence of its own."""
    target, draft = engine.models
    sequence = engine.new_sequence()
    assert draft and sequence.draft
    sequence.tokens = [100 + number % 1000 for number in range(context)]
    seat = DraftSeat(draft.session, sequence.draft, do_nothing, SessionLock())
    drafter = PardDrafter(seat, memory=sequence.memory, shared=engine._shared)
    if mode == DEPENDENT:
        drafter = engine._pard(seat, sequence.memory, do_nothing)
    reads = drafter.seen is not None
    columns = engine._columns if reads else None
    place = TargetSeat(target.session, sequence.target, do_nothing, SessionLock(), features=reads, columns=columns)
    return decode(place, drafter, sequence.tokens, settings, FixedAcceptance(accepted))


def timed(run: Generator[Step, None, None]) -> tuple[float, float, float, float]:
    """The seconds of the next round, by `PARTS`."""
    start = perf_counter()
    step = next(run)
    total = perf_counter() - start
    return total, step.draft_seconds, step.verify_seconds, total - step.draft_seconds - step.verify_seconds


def summary(found: NDArray[np.float64]) -> Cost:
    """found: milliseconds, [2 modes, rounds, parts]."""
    medians = np.median(found, axis=1)
    modes = [ModeTimes(mode, *map(float, row)) for mode, row in zip((DEPENDENT, INDEPENDENT), medians, strict=True)]
    more = found[0, :, 0] - found[1, :, 0]
    drawn = np.random.default_rng(0).integers(len(more), size=(RESAMPLES, len(more)))
    low, high = np.percentile(np.median(more[drawn], axis=1), [2.5, 97.5]) / modes[1].round
    middle = float(np.median(more))
    return Cost(len(more), (modes[0], modes[1]), middle, middle / modes[1].round, float(low), float(high))


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="draft_modes.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", nargs=2, required=True, metavar=("TARGET", "DRAFT"))
    parser.add_argument("--draft-length", type=int, default=DRAFT_LENGTH, metavar="K")
    parser.add_argument("--accepted", type=int, default=5, metavar="N", help="tokens a round, 1 to K + 1 (default: 5)")
    parser.add_argument("--context", type=int, default=256, metavar="N", help="tokens before the first round")
    parser.add_argument("--repeat", type=int, default=60, metavar="N", help="rounds of each mode (default: 60)")
    parser.add_argument("--threads", type=int, metavar="N")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    return exit_code(lambda: report(options))


def report(options: argparse.Namespace) -> None:
    k = require_whole("--draft-length", options.draft_length, 1)
    accepted = require_whole("--accepted", options.accepted, 1, k + 1)
    repeat, context = require_whole("--repeat", options.repeat, 2), require_whole("--context", options.context, 1)
    with load(options.pair[0], options.pair[1], threads=options.threads, draft_mode=DEPENDENT, cache_bytes=0) as pair:
        most = pair.capacity - (repeat + WARM_UP + 2) * accepted - k
        if context > most:
            raise BadInput(
                f"--context {context}: {repeat} rounds of {accepted} tokens leave room for {most}; lower --repeat"
            )
        found = measure(pair.engine, k, accepted, context, repeat)
    if options.json:
        print(json.dumps(asdict(found)))
        return
    title = (
        f"target-dependent mode adds {found.more_ms:.3f} ms to a round, {100 * found.share:.1f} % "
        f"[{100 * found.low:.1f}, {100 * found.high:.1f}]; {found.rounds} rounds, K = {k}, {accepted} tokens a round"
    )
    out = new_table(title, ("mode", *(f"{part}\nms" for part in PARTS)))
    for mode in found.modes:
        out.add_row(mode.mode, *(f"{getattr(mode, part):.3f}" for part in PARTS))
    Console(highlight=False).print(out)


if __name__ == "__main__":
    sys.exit(main())
