"""Curves of step costs, measured on exported folders, and the rates that they predict for a pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import median
from time import perf_counter

from pard_onnx.models.errors import BadInput, TooLong
from pard_onnx.models.spec import Role
from pard_onnx.runtime.model import Artifact, open_artifact, open_model
from pard_onnx.runtime.providers.choice import ProviderCandidates, open_first, provider_candidates
from pard_onnx.runtime.providers.table import CPU
from pard_onnx.runtime.providers.threads import Threads
from pard_onnx.runtime.sessions.session import DraftSession, TargetSession
from pard_onnx.runtime.tuning.steps import RoundCosts, StepCosts, Widths, throughput

WIDTHS = (1, 2, 4, 6, 8, 10, 12, 16, 24, 32)
REPEATS = 5
TOKEN = 0  # the cost of a step does not depend on its tokens
NEW_TOKENS = 4  # the usual number of new tokens in a round
Step = Callable[[int, int], None]  # context, width


def measure(step: Callable[[int], None], widths: Sequence[int] = WIDTHS, repeats: int = REPEATS) -> StepCosts:
    """The median of `repeats` rounds over all widths, so that a slow moment affects one round and not one width."""
    (costs,) = measure_interleaved([step], widths, repeats)
    return costs


def measure_interleaved(
    steps: Sequence[Callable[[int], None]],
    widths: Sequence[int] = WIDTHS,
    repeats: int = REPEATS,
    before: int = 0,
) -> list[StepCosts]:
    """The same for several models that are compared: each width is measured on all models before the next width.

    before: steps of the same model before each one that is measured: threads of a model measured before may still wait
    for work by spinning, and this model's may sleep.
    """
    for step, width in product(steps, widths):  # the first run of a shape allocates memory
        step(width)
    seconds: list[dict[int, list[float]]] = [{width: [] for width in widths} for _ in steps]
    for _ in range(repeats):
        for width in widths:
            for step, own in zip(steps, seconds, strict=True):
                for _ in range(before):
                    step(width)
                start = perf_counter()
                step(width)
                own[width].append(perf_counter() - start)
    return [StepCosts(tuple((width, median(own[width])) for width in sorted(own))) for own in seconds]


@dataclass(frozen=True, slots=True)
class Curve:
    """The step costs of a folder's model at one context."""

    folder: str
    role: Role
    precision: str
    context: int
    provider: str  # on which they were measured
    costs: StepCosts  # a target's with all rows of logits, as in verification; a draft's with masks counted as tokens


def measure_folder(
    name: str,
    contexts: Sequence[int],
    *,
    provider: str = CPU.key,
    draft_provider: str | None = None,
    provider_options: Mapping[str, object] | None = None,
    draft_provider_options: Mapping[str, object] | None = None,
    fallback: bool = False,
    threads: int | None = None,
) -> Iterator[Curve]:
    """Measure the curve of one folder at each context. Raises TooLong for a context that its KV cache cannot hold.

    The options are those of `load`, and a draft runs where `load` would run it. What `load` remembers about the folder
    on this machine is measured again.
    """
    artifact = open_artifact(name)
    manifest = artifact.manifest
    most = manifest.kv_rows - max(WIDTHS)
    for context in contexts:
        if context > most:
            raise TooLong(f"{name}: --contexts {context} is more than its KV cache can hold, {most}")
    on, own = provider_candidates(provider, provider_options, fallback=fallback), draft_provider_options
    if manifest.role == "draft" and (draft_provider or own):
        on = provider_candidates(draft_provider or provider, own, fallback=fallback)
    step, title = open_step(artifact, on, Threads(threads))
    for context in contexts:
        costs = measure(partial(step, context))
        yield Curve(name, manifest.role, manifest.precision, context, title, costs)


def measure_folders(
    names: Sequence[str], context: int, *, provider: str = CPU.key, threads: int | None = None
) -> list[Curve]:
    """Measure the curves of several folders that are compared: all are loaded, and their steps are interleaved."""
    artifacts = [open_artifact(name) for name in names]
    running = [open_step(one, provider_candidates(provider), Threads(threads)) for one in artifacts]
    found = measure_interleaved([partial(step, context) for step, _ in running])
    return [
        Curve(one.name, one.manifest.role, one.manifest.precision, context, title, costs)
        for one, (_, title), costs in zip(artifacts, running, found, strict=True)
    ]


def open_step(artifact: Artifact, on: ProviderCandidates, threads: Threads) -> tuple[Step, str]:
    """Open a model: a function that runs one step, and the title of the provider."""
    model, choice = open_first(on, lambda provider: open_model(artifact, provider, threads, measure_again=True))
    step = draft_step if artifact.manifest.role == "draft" else target_step
    return partial(step, model.session), choice.provider.title


def draft_step(draft: DraftSession, context: int, width: int) -> None:
    draft.cache.set_length(context)
    new = min(width, NEW_TOKENS)  # the rest are masks
    draft.step([TOKEN] * new, width - new + 1)


def target_step(target: TargetSession, context: int, width: int) -> None:
    target.cache.set_length(context)
    target.step([TOKEN] * width, width)


@dataclass(frozen=True, slots=True)
class Prediction:
    """The tokens a second that curves and acceptance predict for a draft length."""

    draft_length: int
    tokens_per_second: float


def predict(
    draft: Curve, target: Curve, acceptance: Sequence[float], overhead: float, widths: Widths
) -> list[Prediction]:
    """Predictions from plain decoding (0) to as many drafts as `acceptance` has positions."""
    costs = RoundCosts(draft.costs, target.costs, overhead, widths)
    return [Prediction(k, throughput(costs, acceptance, k)) for k in range(len(acceptance) + 1)]


def parse_contexts(text: str) -> tuple[int, ...]:
    """Parse '256,1024'. Raises BadInput for anything else."""
    try:
        contexts = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise BadInput(f"--contexts takes numbers of tokens as 256,1024, not {text!r}") from None
    if min(contexts) < 0:
        raise BadInput(f"--contexts cannot be negative: {text!r}")
    return contexts
