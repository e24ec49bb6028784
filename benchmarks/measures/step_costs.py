"""Step-cost curves of exported folders, and what they predict for a pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from pard_onnx.models.errors import BadInput, TooLong
from pard_onnx.models.spec import Role
from pard_onnx.runtime.model import Artifact, open_artifact, open_model
from pard_onnx.runtime.providers.choice import ProviderCandidates, open_first, provider_candidates
from pard_onnx.runtime.providers.table import CPU
from pard_onnx.runtime.providers.threads import Threads
from pard_onnx.runtime.sessions.session import DraftSession, TargetSession
from pard_onnx.runtime.tuning.steps import WIDTHS, RoundCosts, StepCosts, Widths, measure, measure_in_turn, throughput

TOKEN = 0  # which one it is makes no difference to the cost
CONTEXT = 256
Step = Callable[[int, int], None]  # context, width


@dataclass(frozen=True, slots=True)
class Curve:
    """A folder's steps at one context; a target's with all rows of logits, as verifying needs them; a draft's
    with its masks counted as tokens. provider: on which they were measured."""

    folder: str
    role: Role
    precision: str
    context: int
    provider: str
    costs: StepCosts


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
    """The curves of one folder, at each context; TooLong for one that its KV cache cannot hold.

    Where it runs: as of `load`, a draft where the draft would. What `load` keeps about the folder on this machine is
    found out anew on the way.
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
    step, title = opened(artifact, on, Threads(threads))
    for context in contexts:
        costs = measure(partial(step, context))
        yield Curve(name, manifest.role, manifest.precision, context, title, costs)


def measure_folders(
    names: Sequence[str], context: int, *, provider: str = CPU.key, threads: int | None = None
) -> list[Curve]:
    """The curves of several folders, all loaded, whose steps take turns, so that they can be compared."""
    artifacts = [open_artifact(name) for name in names]
    running = [opened(one, provider_candidates(provider), Threads(threads)) for one in artifacts]
    found = measure_in_turn([partial(step, context) for step, _ in running])
    return [
        Curve(one.name, one.manifest.role, one.manifest.precision, context, title, costs)
        for one, (_, title), costs in zip(artifacts, running, found, strict=True)
    ]


def opened(artifact: Artifact, on: ProviderCandidates, threads: Threads) -> tuple[Step, str]:
    """A function that runs one step, and the provider that runs it."""
    model, choice = open_first(on, lambda provider: open_model(artifact, provider, threads, measure_again=True))
    return partial(propose if model.manifest.role == "draft" else verify, model.session), choice.provider.title


def propose(draft: DraftSession, context: int, width: int) -> None:
    draft.cache.set_length(context)
    real = min(width, 4)  # a round's usual number of new tokens; the rest are masks
    draft.step([TOKEN] * real, width - real + 1)


def verify(target: TargetSession, context: int, width: int) -> None:
    target.cache.set_length(context)
    target.step([TOKEN] * width, width)


@dataclass(frozen=True, slots=True)
class Prediction:
    """Tokens a second by draft length, from curves and an acceptance profile."""

    draft_length: int
    tokens_per_second: float


def predict(
    draft: Curve, target: Curve, acceptance: Sequence[float], overhead: float, widths: Widths
) -> list[Prediction]:
    """From plain decoding (0) to as many drafts as the profile knows."""
    costs = RoundCosts(draft.costs, target.costs, overhead, widths)
    return [Prediction(k, throughput(costs, acceptance, k)) for k in range(len(acceptance) + 1)]


def parse_contexts(text: str) -> tuple[int, ...]:
    """'256,1024' to numbers; BadInput if it is anything else."""
    try:
        contexts = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise BadInput(f"--contexts takes numbers of tokens as 256,1024, not {text!r}") from None
    if min(contexts) < 0:
        raise BadInput(f"--contexts cannot be negative: {text!r}")
    return contexts
