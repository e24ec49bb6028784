"""The self-check: whether a provider computes an artifact's steps correctly, before the first token is generated.

Some providers compute attention wrongly if a step has several tokens, and report no error. So some tokens are run one
by one ("single steps"), then in one step after a rollback, then in one step from the start, and the rows of logits are
compared. The rows of the single steps are also compared with the CPU's, since a provider may make the same error in
every step.

The difference of two rows is the root mean square of their logits' differences, divided by the standard deviation of
the logits; the largest difference of all rows counts. Rounding gave 0.016 at most with int4 weights (2 to 16 tokens in
a step, on the CPU) and 0.026 between WebGPU and the CPU; wrong attention gave 0.06 and more. With 8-bit activations of
one scale the two were 0.056 and 0.066. The tolerances lie between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from statistics import median
from time import perf_counter
from typing import Literal, TypeVar

import numpy as np

from pard_onnx.models.errors import BadProvider
from pard_onnx.models.manifest import Manifest
from pard_onnx.models.precision import Precision
from pard_onnx.runtime.providers.table import Provider
from pard_onnx.runtime.sessions.session import DraftSession, Floats, TargetSession, mask_tokens

Steps = Literal["any", "single", "none"]  # which steps are correct
# Runs a step of these tokens and returns the logits of its last rows, [rows, vocabulary]; the second is their number.
Feed = Callable[[Sequence[int], int], Floats]
RoleSession = TypeVar("RoleSession", TargetSession, DraftSession)

CONTEXT = 16  # tokens before the step that is compared
WIDTH = 9  # tokens of the step that is compared
REJECTED = 4  # tokens that are written and rolled back before it
TOLERANCE: dict[Precision, float] = {
    "fp32": 0.005,
    "fp16": 0.02,
    "int8": 0.04,
    "int4": 0.04,
    "int8-a8w8": 0.06,
    "int8-a16w8": 0.02,
}
CACHE = {"float32": 0.0, "float16": 0.02, "int8": 0.04}  # the least tolerance by type of the KV cache
ACROSS = 2.0  # the tolerance is multiplied by this between a provider and the CPU, which quantizes activations
NOT_FINITE = 1e6  # the difference of rows with NaN or infinity
SLOW = 3.0  # a device is slow if a single step takes more than this many times the CPU's: a software adapter, say


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the self-check of an artifact on a provider found."""

    several: float  # the difference between the rows of a step of several tokens and those of single steps
    single: float | None  # the difference between single steps and the CPU's; None if the CPU cannot run the graph
    tolerance: float  # of `several`
    seconds: float  # of a single step
    cpu_seconds: float | None  # of a single step on the CPU

    def __post_init__(self) -> None:
        """ValueError for numbers that no check gives. A verdict may come from a file."""
        numbers = (self.several, self.single or 0.0, self.tolerance, self.seconds, self.cpu_seconds or 0.0)
        if not all(0 <= number < inf for number in numbers):
            raise ValueError(f"the numbers of a verdict are finite and at least 0, not {numbers}")

    @property
    def steps(self) -> Steps:
        """Which steps the provider computes correctly."""
        if self.single is not None and self.single > ACROSS * self.tolerance:
            return "none"
        return "any" if self.several <= self.tolerance else "single"

    @property
    def slow(self) -> bool:
        """Whether the CPU is much faster."""
        return self.cpu_seconds is not None and self.seconds > SLOW * self.cpu_seconds

    def describe(self) -> str:
        """The differences and their tolerances in words."""
        single = "not compared" if self.single is None else f"{self.single:.2g}"
        return (
            f"rows of a step of several tokens differ by {self.several:.2g} from single steps, single steps by "
            f"{single} from the CPU, where {self.tolerance:.2g} and {ACROSS * self.tolerance:.2g} are rounding"
        )

    def pace(self) -> str:
        """The times of a single step in words."""
        cpu = "" if self.cpu_seconds is None else f", {1000 * self.cpu_seconds:.3g} ms on the CPU"
        return f"a single step takes {1000 * self.seconds:.3g} ms{cpu}"


def tolerance(manifest: Manifest) -> float:
    """The largest difference by rounding between a step of several tokens and single steps."""
    return max(TOLERANCE[manifest.precision], CACHE[manifest.kv_dtype])


def check_target(session: TargetSession, reference: Callable[[], TargetSession | None]) -> Verdict:
    """Check a target's session, whose cache is empty afterwards.

    reference: opens the same artifact on the CPU; returns None if the CPU cannot run it.
    """
    return compare_steps(
        session,
        random_tokens(session.manifest),
        reference,
        lambda model: lambda ids, keep: model.step(ids, keep).logits,
    )


def check_draft(session: DraftSession, reference: Callable[[], DraftSession | None]) -> Verdict:
    """As `check_target`. The last tokens are masks, which some graphs append themselves."""
    ids = [*random_tokens(session.manifest)[: CONTEXT + 1], *mask_tokens(session.manifest, WIDTH)]

    def feed(model: DraftSession, ids: Sequence[int], keep: int) -> Floats:
        real = len(ids) - keep + 1 if keep > 1 else len(ids)  # all rows but the first of several belong to masks
        return model.logits(ids[:real], keep)

    return compare_steps(session, ids, reference, lambda model: partial(feed, model))


def random_tokens(manifest: Manifest) -> list[int]:
    """CONTEXT + WIDTH token ids, the same in every call."""
    drawn = np.random.default_rng(0).integers(manifest.spec.vocabulary.size, size=CONTEXT + WIDTH)
    return [int(token) for token in drawn]


def compare_steps(
    session: RoleSession,
    ids: Sequence[int],
    reference: Callable[[], RoleSession | None],
    feed_of: Callable[[RoleSession], Feed],
) -> Verdict:
    """Run the steps that are compared, on the session and on the reference.

    ids: CONTEXT tokens, then WIDTH tokens that are run one by one and in one step. feed_of: how to run a session.
    """
    size, feed = session.manifest.spec.vocabulary.size, feed_of(session)
    rows, seconds = run_single_steps(feed, ids)
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
    _, cpu_seconds = run_single_steps(feed_of(cpu), ids[CONTEXT:])
    return Verdict(several, across, tolerance(session.manifest), seconds, cpu_seconds)


def run_single_steps(feed: Feed, ids: Sequence[int]) -> tuple[Floats, float]:
    """The rows of single steps, and the median of their seconds: the first steps may compile."""
    rows, seconds = [], []
    for token in ids:
        start = perf_counter()
        rows.append(feed([token], 1).copy())
        seconds.append(perf_counter() - start)
    return np.concatenate(rows), median(seconds)


def difference(rows: Floats, expected: Floats, size: int) -> float:
    """The largest difference of all rows, as the module's docstring defines it; size: of the vocabulary, without
    padding."""
    rows, expected = rows[:, :size], expected[:, :size]
    if not (np.isfinite(rows).all() and np.isfinite(expected).all()):
        return NOT_FINITE
    spread = np.maximum(expected.std(axis=1), 1e-6)
    return float((np.sqrt(np.square(rows - expected).mean(axis=1)) / spread).max())


def require_right(verdict: Verdict, name: str, provider: Provider) -> None:
    """Raise BadProvider, with the numbers, if not even single steps are correct."""
    if verdict.steps == "none":
        raise BadProvider(
            f"provider {provider.title!r} computes {name} wrongly: {verdict.describe()}; {remedy(provider)}"
        )


def single_steps_warning(verdict: Verdict, name: str, provider: Provider) -> str:
    """The warning for a provider of which only single steps are correct."""
    return (
        f"{provider.title} computes steps of several tokens of {name} wrongly, so it runs token by token: right, but "
        f"slow ({verdict.describe()}); {remedy(provider)}"
    )


def slow_reason(verdict: Verdict | None, name: str, provider: Provider) -> str | None:
    """Why the CPU is the better choice, where the provider is slow; None where it is not."""
    return f"{provider.title} is slow with {name}: {verdict.pace()}" if verdict and verdict.slow else None


def remedy(provider: Provider) -> str:
    """What a user can do about a wrong result."""
    return f"export it with pard-export --device {provider.key}, or take another provider"
