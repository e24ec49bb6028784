"""A pair on a prompt set, or several drafts of one target: the summary of a trial, the rates that step costs predict,
and the memory used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from pard_onnx.benchmarks.measures.step_costs import Curve, Prediction, predict
from pard_onnx.benchmarks.peers.comparison import PeerResult
from pard_onnx.models.checks import AUTO
from pard_onnx.runtime.pair import Pair
from pard_onnx.runtime.tuning.steps import ANY, Widths

from .trial import PLAIN, REFERENCE, TUNED, PromptSet, Summary, Trial, Way, pard_way, summarize


@dataclass(frozen=True, slots=True)
class Bench:
    """One pair, or the drafts of one target, on one prompt set."""

    target: str
    draft: str  # the drafters of a comparison, separated by commas
    prompts: str
    prompt_count: int
    ways: tuple[Summary, ...]
    context: int  # mean number of tokens in the KV cache during a round
    exact: bool  # whether widths of steps are known whose rows are bitwise equal
    widths: Widths  # those widths
    kernel: str  # of the quantized matmuls
    peak_bytes: int  # resident memory of this process at its peak, while the pair was loaded
    predictions: tuple[Prediction, ...] = ()
    rivals: tuple[PeerResult, ...] = ()
    drift: float | None = None  # rate of plain decoding after the peers, divided by that before them

    @property
    def title(self) -> str:
        return f"{Path(self.target).name} + {Path(self.draft).name}, {self.prompts}"

    @property
    def fixed(self) -> list[Summary]:
        """The summaries of PARD with fixed draft lengths."""
        return [way for way in self.ways if way.draft_length and way.draft_length != AUTO]

    @property
    def rounds(self) -> list[Summary]:
        """The summaries of all ways with drafts."""
        return [way for way in self.ways if way.draft_length]

    @property
    def by_drafter(self) -> dict[str, list[Summary]]:
        """The summaries of fixed draft lengths by the label of their drafter; of a pair, the label is its title."""
        found: dict[str, list[Summary]] = {}
        for way in self.fixed:
            found.setdefault(way.drafter or self.title, []).append(way)
        return found

    def tuned(self, drafter: str) -> Summary:
        """Self-tuned decoding with one of `by_drafter`."""
        return next(way for way in self.ways if way.draft_length == AUTO and drafter in (way.drafter, self.title))


def ways(lengths: Sequence[int]) -> list[Way]:
    """The ways of a bench: plain decoding, exact plain decoding, self-tuned drafts and these draft lengths."""
    return [PLAIN, REFERENCE, TUNED, *map(pard_way, lengths)]


def summarize_trial(pair: Pair, draft: str, prompts: PromptSet, trial: Trial) -> Bench:
    """The summary of a trial on a prompt set. pair: with the trial's target; draft: see `Bench`."""
    sizes = [r.stats.prompt_tokens + r.stats.new_tokens / 2 for found in trial.results.values() for r in found]
    return Bench(
        target=pair.target_name,
        draft=draft,
        prompts=prompts.name,
        prompt_count=len(prompts.prompts),
        ways=tuple(summarize(trial, way) for way in trial.results),
        context=round(mean(sizes)),
        exact=pair.exact_widths is not None,
        widths=pair.exact_widths or ANY,
        kernel=pair.kernel,
        peak_bytes=peak_bytes(),
    )


def with_prediction(one: Bench, target: Curve, draft: Curve) -> Bench:
    """The bench with predictions from the curves, for the acceptance and overhead of its longest measured draft."""
    longest = max(one.fixed, key=lambda way: len(way.acceptance))
    overhead = longest.round_seconds * longest.shares.other
    return replace(one, predictions=tuple(predict(draft, target, longest.acceptance, overhead, one.widths)))


Measure = Callable[[str, int], Curve]  # (folder, context)


def with_predictions(
    benches: Sequence[Bench], measure: Measure, context: int | None
) -> tuple[list[Bench], list[Curve]]:
    """The benches with predictions, and the curves of their folders.

    context: at which steps are measured; None: the mean context of each pair's prompts.
    """
    curves: list[Curve] = []
    out: list[Bench] = []
    for one in benches:
        at = context if context is not None else one.context
        target, draft = (measure(folder, at) for folder in (one.target, one.draft))
        curves += [target, draft]
        out.append(with_prediction(one, target, draft))
    return out, curves


STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
PEAK_ONLY = b"5"  # resets the peak resident set size only, see proc(5)


def reset_peak() -> bool:
    """Forget earlier peaks of memory; False if the system cannot, and peaks are those of the process's whole life."""
    try:
        CLEAR.write_bytes(PEAK_ONLY)
    except OSError:
        return False
    return True


def peak_bytes() -> int:
    """The most resident memory that this process has held."""
    if STATUS.exists():
        fields = dict(line.split(":", 1) for line in STATUS.read_text("utf-8").splitlines() if ":" in line)
        return 1024 * int(fields["VmHWM"].split()[0])
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
