"""Pairs on prompt sets: trials, their summaries, and what the step costs predict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from pard_onnx.benchmarks.measures import peak_memory
from pard_onnx.benchmarks.measures.step_costs import Curve, Prediction, predict
from pard_onnx.benchmarks.peers.comparison import Rival
from pard_onnx.runtime.options import AUTO
from pard_onnx.runtime.pair import Pair
from pard_onnx.runtime.tuning.steps import ANY, Widths

from .statistics import Summary, summary
from .trial import PLAIN, REFERENCE, TUNED, PromptSet, Trial, Way, pard


@dataclass(frozen=True, slots=True)
class Bench:
    """One pair on one prompt set. context: mean tokens in the cache during a round; exact, widths: whether steps
    of these widths are known to give equal rows; kernel: of the quantized matmuls; peak_bytes: of this process while
    the pair was loaded."""

    target: str
    draft: str
    prompts: str
    prompt_count: int
    ways: tuple[Summary, ...]
    context: int
    exact: bool
    widths: Widths
    kernel: str
    peak_bytes: int
    predictions: tuple[Prediction, ...] = ()
    rivals: tuple[Rival, ...] = ()
    drift: float | None = None  # plain decoding after the peers over plain decoding before

    @property
    def title(self) -> str:
        return f"{Path(self.target).name} + {Path(self.draft).name}, {self.prompts}"

    @property
    def fixed(self) -> list[Summary]:
        """Of PARD with fixed draft lengths."""
        return [way for way in self.ways if way.draft_length and way.draft_length != AUTO]

    @property
    def rounds(self) -> list[Summary]:
        """Of all that drafts."""
        return [way for way in self.ways if way.draft_length]


def ways(lengths: Sequence[int]) -> list[Way]:
    """Plain decoding, exact plain decoding, self-tuned drafts and every draft length."""
    return [PLAIN, REFERENCE, TUNED, *map(pard, lengths)]


def bench(pair: Pair, prompts: PromptSet, trial: Trial) -> Bench:
    """What a trial on a prompt set says."""
    sizes = [r.stats.prompt_tokens + r.stats.new_tokens / 2 for found in trial.results.values() for r in found]
    return Bench(
        target=pair.target_name,
        draft=pair.draft_name or "",
        prompts=prompts.name,
        prompt_count=len(prompts.prompts),
        ways=tuple(summary(trial, way) for way in trial.results),
        context=round(mean(sizes)),
        exact=pair.exact_widths is not None,
        widths=pair.exact_widths or ANY,
        kernel=pair.kernel,
        peak_bytes=peak_memory.peak_bytes(),
    )


def predicted(one: Bench, target: Curve, draft: Curve) -> Bench:
    """With predictions from the profile, and the overhead, of the longest draft that was measured."""
    longest = max(one.fixed, key=lambda way: len(way.acceptance))
    overhead = longest.round_seconds * longest.shares.other
    return replace(one, predictions=tuple(predict(draft, target, longest.acceptance, overhead, one.widths)))


Measure = Callable[[str, int], Curve]  # (folder, context)


def with_predictions(
    benches: Sequence[Bench], measure: Measure, context: int | None
) -> tuple[list[Bench], list[Curve]]:
    """Curves of the benches' folders, at `context` or else at the one of each pair's prompts, and the predictions."""
    curves: list[Curve] = []
    out: list[Bench] = []
    for one in benches:
        at = context if context is not None else one.context
        target, draft = (measure(folder, at) for folder in (one.target, one.draft))
        curves += [target, draft]
        out.append(predicted(one, target, draft))
    return out, curves
