"""Whether a provider computes an artifact's steps right, found out before it writes a word.

Some providers compute attention wrongly as soon as a step has several tokens, and say nothing. So some tokens are
run one by one, then in one step after a rollback, then in one step from the start, and their rows compared; and the
single steps' rows are compared with the CPU's, since a provider may also be wrong in the same way every time.

Rows differ by rounding: by 0.016 at most with int4 weights (2 to 16 tokens a step, CPU), 0.026 between WebGPU and
CPU, and wrong attention differed by 0.06 and more, in the root mean square of the worst row over the spread of its
logits. With activations in 8 bits by one scale it was 0.056, and 0.066. The tolerances lie between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter
from typing import Literal, TypeVar

import numpy as np

from pard_onnx.models.errors import BadProvider
from pard_onnx.models.manifest import Manifest
from pard_onnx.models.precision import Precision
from pard_onnx.runtime.providers.table import Provider
from pard_onnx.runtime.sessions.session import DraftSession, Floats, TargetSession, mask_tokens

Steps = Literal["any", "single", "none"]  # which steps are right
Feed = Callable[[Sequence[int], int], Floats]  # tokens, last rows wanted: [rows, vocabulary]
Model = TypeVar("Model", TargetSession, DraftSession)

CONTEXT, WIDTH = 16, 9  # tokens before the step that is compared, and its own
REJECTED = 4  # tokens written and rolled back before it
TOLERANCE: dict[Precision, float] = {
    "fp32": 0.005,
    "fp16": 0.02,
    "int8": 0.04,
    "int4": 0.04,
    "int8-a8w8": 0.06,
    "int8-a16w8": 0.02,
}
CACHE = {"float32": 0.0, "float16": 0.02, "int8": 0.04}  # at least, by type of the KV cache
ACROSS = 2.0  # times the tolerance, between a provider and the CPU, whose activations are quantized
HOPELESS = 1e6  # the difference of rows that are not numbers
SLOWER = 3.0  # a device whose single steps take so many times as long as the CPU's is no gain: a software adapter, say


@dataclass(frozen=True, slots=True)
class Verdict:
    """several: the difference of a step of several tokens from single ones; single: of single ones from the CPU's,
    None where the CPU does not run the graph; seconds, cpu_seconds: of a single step."""

    several: float
    single: float | None
    tolerance: float
    seconds: float
    cpu_seconds: float | None

    @property
    def steps(self) -> Steps:
        if self.single is not None and self.single > ACROSS * self.tolerance:
            return "none"
        return "any" if self.several <= self.tolerance else "single"

    @property
    def slow(self) -> bool:
        return self.cpu_seconds is not None and self.seconds > SLOWER * self.cpu_seconds

    def describe(self) -> str:
        single = "not compared" if self.single is None else f"{self.single:.2g}"
        return (
            f"rows of a step of several tokens differ by {self.several:.2g} from single steps, single steps by "
            f"{single} from the CPU, where {self.tolerance:.2g} and {ACROSS * self.tolerance:.2g} are rounding"
        )

    def pace(self) -> str:
        cpu = "" if self.cpu_seconds is None else f", {1000 * self.cpu_seconds:.3g} ms on the CPU"
        return f"a single step takes {1000 * self.seconds:.3g} ms{cpu}"


def tolerance(manifest: Manifest) -> float:
    return max(TOLERANCE[manifest.precision], CACHE[manifest.kv_dtype])


def check_target(session: TargetSession, reference: Callable[[], TargetSession | None]) -> Verdict:
    """reference: the same model on the CPU, opened when it is needed. The session's cache is empty afterwards."""
    return compared(
        session, tokens(session.manifest), reference, lambda model: lambda ids, keep: model.step(ids, keep).logits
    )


def check_draft(session: DraftSession, reference: Callable[[], DraftSession | None]) -> Verdict:
    """As `check_target`; the last tokens are masks, which the graph appends itself or is given."""
    ids = [*tokens(session.manifest)[: CONTEXT + 1], *mask_tokens(session.manifest, WIDTH)]

    def feed(model: DraftSession, ids: Sequence[int], keep: int) -> Floats:
        real = len(ids) - keep + 1 if keep > 1 else len(ids)  # of several rows, all but the first are masks'
        return model.logits(ids[:real], keep)

    return compared(session, ids, reference, lambda model: partial(feed, model))


def tokens(manifest: Manifest) -> list[int]:
    drawn = np.random.default_rng(0).integers(manifest.spec.vocabulary.size, size=CONTEXT + WIDTH)
    return [int(token) for token in drawn]


def compared(
    session: Model, ids: Sequence[int], reference: Callable[[], Model | None], feed_of: Callable[[Model], Feed]
) -> Verdict:
    """ids: the context, then the tokens that are run one by one and together."""
    size, feed = session.manifest.spec.vocabulary.size, feed_of(session)
    rows, seconds = singly(feed, ids)
    single = rows[CONTEXT:]
    session.rollback(CONTEXT)
    feed(ids[:REJECTED], 1)
    session.rollback(CONTEXT)
    after = feed(ids[CONTEXT:], WIDTH).copy()
    session.rollback(0)
    whole = feed(ids, WIDTH).copy()
    session.rollback(0)
    several = max(difference(after, single, size), difference(whole, single, size))
    cpu = reference()
    if cpu is None:
        return Verdict(several, None, tolerance(session.manifest), seconds, None)
    across = difference(single, feed_of(cpu)(ids, WIDTH), size)
    cpu.rollback(CONTEXT)
    _, cpu_seconds = singly(feed_of(cpu), ids[CONTEXT:])
    return Verdict(several, across, tolerance(session.manifest), seconds, cpu_seconds)


def singly(feed: Feed, ids: Sequence[int]) -> tuple[Floats, float]:
    """The rows of single steps, and the seconds of the middle one: the first ones may compile."""
    rows, seconds = [], []
    for token in ids:
        start = perf_counter()
        rows.append(feed([token], 1).copy())
        seconds.append(perf_counter() - start)
    return np.concatenate(rows), median(seconds)


def difference(rows: Floats, expected: Floats, size: int) -> float:
    """Of the worst row: the root mean square of its logits' differences, over their standard deviation."""
    rows, expected = rows[:, :size], expected[:, :size]
    if not (np.isfinite(rows).all() and np.isfinite(expected).all()):
        return HOPELESS
    spread = np.maximum(expected.std(axis=1), 1e-6)
    return float((np.sqrt(np.square(rows - expected).mean(axis=1)) / spread).max())


def require_right(verdict: Verdict, name: str, provider: Provider) -> None:
    """BadProvider, with the numbers, where not even single steps are right."""
    if verdict.steps == "none":
        raise BadProvider(
            f"provider {provider.title!r} computes {name} wrongly: {verdict.describe()}; {remedy(provider)}"
        )


def single_steps_warning(verdict: Verdict, name: str, provider: Provider) -> str:
    return (
        f"{provider.title} computes steps of several tokens of {name} wrongly, so it runs token by token: right, but "
        f"slow ({verdict.describe()}); {remedy(provider)}"
    )


def no_gain(verdict: Verdict | None, name: str, provider: Provider) -> str | None:
    """Why the provider is worth nothing beside the CPU; None if it may be."""
    return f"{provider.title} is slow with {name}: {verdict.pace()}" if verdict and verdict.slow else None


def remedy(provider: Provider) -> str:
    return f"export it with pard-export --device {provider.key}, or take another provider"
