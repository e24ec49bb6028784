"""The format of a draft with which its target decodes the most tokens a second on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pard_onnx.benchmarks.trial import DecodingRequest, acceptance, pard_way, run_trial
from pard_onnx.models.checks import Progress, no_progress
from pard_onnx.models.errors import BadInput
from pard_onnx.models.manifest import Manifest, MeasuredFormat, Throughput
from pard_onnx.runtime.model import Artifact
from pard_onnx.runtime.pair import Pair, load
from pard_onnx.runtime.result import Result
from pard_onnx.runtime.tuning.steps import ANY, RoundCosts, throughput, tokens_per_round

from . import CONTEXT
from .step_costs import measure_folders

DRAFTS = 12  # draft length of the rounds that measure acceptance, and the largest that is considered
NEW_TOKENS = 64  # of each prompt
CLOSE = 0.98  # rates above this share of the highest count as equal, since measurements do not tell them apart


def compare_drafts(
    target: Artifact, drafts: Mapping[str, Path], prompts: Sequence[str], progress: Progress = no_progress
) -> Throughput:
    """Measure exported drafts, by recipe, with the target: acceptance on the prompts, and interleaved step costs."""
    acceptances, pairs = {}, len(drafts)
    overhead, widths = 0.0, ANY
    for done, (recipe, folder) in enumerate(drafts.items()):
        progress("accepted", done, pairs)
        with load(target.name, folder, cache_bytes=0) as pair:
            found = results(pair, prompts)
            widths = pair.exact_widths or ANY
        acceptances[recipe] = acceptance(found)
        if not acceptances[recipe]:
            raise BadInput(
                f"{target.name}: ends every prompt's text at once, so nothing is drafted; give --prompts FILE"
            )
        overhead += overhead_seconds(found) / pairs
    progress("accepted", pairs, pairs)
    progress("steps", 0, 1)
    context = min(CONTEXT, target.manifest.capacity)
    verify, *curves = measure_folders([target.name, *map(str, drafts.values())], context)
    progress("steps", 1, 1)
    costs = {r: RoundCosts(c.costs, verify.costs, overhead, widths) for r, c in zip(drafts, curves, strict=True)}
    tried = tuple(at_best_length(r, Manifest.read(drafts[r]).bytes, costs[r], acceptances[r]) for r in drafts)
    plain = throughput(next(iter(costs.values())), (), 0)
    return Throughput(target.manifest.source.model, target.manifest.precision, plain, tried)


def results(pair: Pair, prompts: Sequence[str]) -> Sequence[Result]:
    """The results of decoding the prompts with DRAFTS drafts a round."""
    way = pard_way(DRAFTS)
    return run_trial({way.drafter: pair}, prompts, [way], DecodingRequest(NEW_TOKENS)).results[way]


def overhead_seconds(found: Sequence[Result]) -> float:
    """Mean seconds of a round outside of both models' steps."""
    rounds = sum(result.stats.rounds for result in found)
    return sum(result.stats.seconds.other for result in found) / max(1, rounds)


def at_best_length(recipe: str, size: int, costs: RoundCosts, by_position: Sequence[float]) -> MeasuredFormat:
    """A format at the draft length with the most tokens a second; by_position: its acceptance at each position."""
    rate, length = max((throughput(costs, by_position, k), -k) for k in range(1, len(by_position) + 1))
    accepted = tokens_per_round(by_position, -length)
    return MeasuredFormat(recipe, size, -length, costs.draft(accepted - length - 1), accepted, rate)


def best_draft(tried: Sequence[MeasuredFormat]) -> MeasuredFormat:
    """The smallest draft among those whose rates count as equal to the highest."""
    most = max(one.tokens_per_second for one in tried)
    return min((one for one in tried if one.tokens_per_second >= CLOSE * most), key=lambda one: one.bytes)
