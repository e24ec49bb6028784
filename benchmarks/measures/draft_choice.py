"""Which format of a draft gives its target the most tokens a second on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pard_onnx.benchmarks.statistics import acceptance
from pard_onnx.benchmarks.trial import Request, pard, run
from pard_onnx.models.checks import Progress, no_progress
from pard_onnx.models.errors import BadInput
from pard_onnx.models.manifest import Manifest, MeasuredFormat, Throughput
from pard_onnx.runtime.model import Artifact
from pard_onnx.runtime.pair import Pair, load
from pard_onnx.runtime.result import Result
from pard_onnx.runtime.tuning.steps import ANY, RoundCosts, throughput, tokens_per_round

from .step_costs import CONTEXT, measure_folders

# Recipes that can win. int8 loses next to nothing by rounding to nearest, so calibrating it gains nothing. Floats read
# four to eight times the bytes.
FORMATS = ("int4-rtn", "int4-gptq", "int8-rtn", "int8-dynamic")
DRAFTS = 12  # of the rounds that acceptance is measured in, and the longest draft that is weighed
NEW_TOKENS = 64  # a prompt
CLOSE = 0.98  # of the most tokens a second: what measurements do not tell apart


def compare(
    target: Artifact, drafts: Mapping[str, Path], prompts: Sequence[str], progress: Progress = no_progress
) -> Throughput:
    """Measure exported drafts, by recipe, beside the target: acceptance on the prompts, step costs in turn."""
    profiles, pairs = {}, len(drafts)
    overhead, widths = 0.0, ANY
    for done, (recipe, folder) in enumerate(drafts.items()):
        progress("accepted", done, pairs)
        with load(target.name, folder) as pair:
            found = results(pair, prompts)
            widths = pair.exact_widths or ANY
        profiles[recipe] = acceptance(found)
        if not profiles[recipe]:
            raise BadInput(
                f"{target.name}: ends every prompt's text at once, so nothing is drafted; give --prompts FILE"
            )
        overhead += outside(found) / pairs
    progress("accepted", pairs, pairs)
    progress("steps", 0, 1)
    context = min(CONTEXT, target.manifest.capacity)
    verify, *curves = measure_folders([target.name, *map(str, drafts.values())], context)
    progress("steps", 1, 1)
    costs = {r: RoundCosts(c.costs, verify.costs, overhead, widths) for r, c in zip(drafts, curves, strict=True)}
    tried = tuple(weighed(r, Manifest.read(drafts[r]).bytes, costs[r], profiles[r]) for r in drafts)
    plain = throughput(next(iter(costs.values())), (), 0)
    return Throughput(target.manifest.source.model, target.manifest.precision, plain, tried)


def results(pair: Pair, prompts: Sequence[str]) -> Sequence[Result]:
    """One way alone, so that there is nothing to take turns with."""
    way = pard(DRAFTS)
    return run(pair, prompts, [way], Request(NEW_TOKENS)).results[way]


def outside(found: Sequence[Result]) -> float:
    """Seconds of a round outside of both models' steps."""
    rounds = sum(result.stats.rounds for result in found)
    return sum(result.stats.seconds.other for result in found) / max(1, rounds)


def weighed(recipe: str, size: int, costs: RoundCosts, profile: Sequence[float]) -> MeasuredFormat:
    """A format at the draft length that gives it the most tokens a second; profile: acceptance by position."""
    rate, length = max((throughput(costs, profile, k), -k) for k in range(1, len(profile) + 1))
    accepted = tokens_per_round(profile, -length)
    return MeasuredFormat(recipe, size, -length, costs.draft(accepted - length - 1), accepted, rate)


def best(tried: Sequence[MeasuredFormat]) -> MeasuredFormat:
    """The smallest of those that give about the most tokens a second."""
    most = max(one.tokens_per_second for one in tried)
    return min((one for one in tried if one.tokens_per_second >= CLOSE * most), key=lambda one: one.bytes)
