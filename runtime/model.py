"""The models of a pair: artifact folders that are verified, opened on a provider, checked and measured."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from os import PathLike, fspath
from pathlib import Path
from threading import RLock
from time import perf_counter
from typing import Any, Generic

from pard_onnx.models import hub
from pard_onnx.models.checkpoints.added_tokens import read_added_tokens
from pard_onnx.models.checkpoints.vocabulary import MOST_TOKENIZER
from pard_onnx.models.checks import Progress, no_progress
from pard_onnx.models.errors import BadArtifact, BadProvider, Failure, PardWarning
from pard_onnx.models.folder_files import read_file
from pard_onnx.models.logs import logger
from pard_onnx.models.manifest import Manifest
from pard_onnx.models.spec import ModelSpec, Role

from .decoding.shared_ids import SharedIds
from .providers.choice import incompatibility
from .providers.memory import start_provider
from .providers.table import CPU, Provider, first_line
from .providers.threads import Threads
from .sessions.dynamic_shapes import FusedDraft, FusedTarget, PortableDraft, PortableTarget
from .sessions.fixed_shapes import FixedShapesDraft, FixedShapesTarget
from .sessions.session import AnySession
from .sessions.single_step import SingleStepDraft, SingleStepTarget
from .text.tokenizer import TOKENIZER, Text, first_difference
from .tuning.measurement import Tuning, confirms, measure_draft, measure_prefill_chunk, measure_target
from .tuning.remembered import load_or_measure, record_path
from .tuning.self_check import (
    Verdict,
    check_draft,
    check_target,
    remedy,
    require_right,
    single_steps_warning,
    slow_reason,
    tolerance,
)
from .tuning.steps import ANY, StepCosts

LOG = logger(__name__)


class SessionLock:
    """The lock of an opened session, which runs one step at a time, whichever pair it is for.

    Reentrant: a run that nobody reads any more may be closed by garbage collection, in the middle of a step of another.
    """

    __slots__ = ("_lock", "lent")

    def __init__(self) -> None:
        self._lock = RLock()
        self.lent = False  # whether several pairs use the session: its buffers may change when the lock is free

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


@dataclass(frozen=True, slots=True)
class Artifact:
    """An artifact folder that was read and verified."""

    name: str  # as the user gave it
    folder: Path
    manifest: Manifest
    commit: str | None = None  # of the hub's repository; None for a local folder

    def text(self) -> Text:
        """The artifact's tokenizer and chat template."""
        return Text(self.folder, self.manifest.spec.chat_template, self.manifest.sizes)


@dataclass(frozen=True, slots=True)
class LoadedModel(Generic[AnySession]):
    """An artifact that was opened on a provider, checked and measured."""

    artifact: Artifact
    session: AnySession
    tuning: Tuning
    verdict: Verdict | None = None  # of the self-check; None on the CPU, with which other providers are compared
    warning: str | None = None  # why every token is run in a step of its own; None where wider steps are correct
    reason: str = ""  # why it runs on this provider
    slow: str | None = None  # why the CPU is the better choice; None where it is not
    borrowed: bool = False  # whether another pair opened it, and may use it, too
    lock: SessionLock = field(default_factory=SessionLock, compare=False, repr=False)  # of the session

    def lend(self) -> LoadedModel[AnySession]:
        """The same open model for another pair. It is closed when no pair has it any more."""
        self.lock.lent = True
        return replace(self, borrowed=True)

    @property
    def manifest(self) -> Manifest:
        return self.artifact.manifest

    @property
    def name(self) -> str:
        return self.artifact.name

    @property
    def provider(self) -> Provider:
        return self.session.provider


def open_artifact(
    name: str | PathLike[str],
    role: Role | None = None,
    revision: str | None = None,
    progress: Progress = no_progress,
) -> Artifact:
    """Find the artifact's folder, read and verify it; BadArtifact if its role is another one.

    revision: a branch, tag or commit of a hub id. progress: of the stages "download" and "verify", in bytes.
    """
    folder = hub.resolve_artifact(fspath(name), revision, progress)
    manifest = Manifest.read(folder)
    if role and manifest.role != role:
        raise BadArtifact(f"{fspath(name)}: is a {manifest.role}, not a {role}; give it as {manifest.role}")
    manifest.verify(folder, progress)
    return Artifact(fspath(name), folder, manifest, hub.fetched_commit(folder))


def require_same_tokenizer(one: Artifact, other: Artifact) -> None:
    """Raise BadArtifact, with the first id whose tokens differ, unless both have the same tokens. The padding of the
    vocabularies may differ."""
    if same_tokens(one, other.folder, other.manifest.sizes):
        return
    if difference := first_difference(one.text().vocabulary(), other.text().vocabulary()):
        raise other_tokenizer(one.name, other.name, *difference)


def other_tokenizer(one: str, other: str, id_: int, ours: str | None, theirs: str | None) -> BadArtifact:
    return BadArtifact(
        f"{other}: its tokenizer is not that of {one}; id {id_} is {theirs!r} there and {ours!r} here; take a draft "
        "made for this target"
    )


def same_tokens(one: Artifact, other: Path, names: Collection[str] | None = None) -> bool:
    """Whether both tokenizers' files plainly give the same tokens; False where that takes a closer look.

    other: the folder of an artifact or a checkpoint; names: of its files that may be read, None for all.
    """

    def added(folder: Path, names: Collection[str] | None) -> list[str]:
        found = read_added_tokens(folder, BadArtifact, names)
        return [token.content for token in (*found.tokens, *found.named.values(), *found.extra)]

    ours, theirs = (read_file(folder / TOKENIZER, MOST_TOKENIZER, BadArtifact) for folder in (one.folder, other))
    return ours == theirs and added(one.folder, one.manifest.sizes) == added(other, names)


def shared_ids(
    target: Artifact, name: str, folder: Path, spec: ModelSpec, names: Collection[str] | None = None
) -> SharedIds | None:
    """The ids that a target and a draft have in common; None if each has all ids of the other.

    name, folder, spec: of the draft, an artifact or a checkpoint; names: of its files that may be read, as a manifest
    lists them, None for all. Raises BadArtifact, naming the id, where both have an id and its tokens differ. Warns with
    PardWarning of ids that only one of them has.
    """
    known, sizes = target.manifest.spec.vocabulary, (target.manifest.spec.vocabulary.size, spec.vocabulary.size)
    if sizes[0] == sizes[1] and same_tokens(target, folder, names):
        return None
    texts = target.text(), Text(folder, None, names)
    ours, theirs = (
        {id_: token for token, id_ in text.vocabulary().items() if id_ < size}
        for text, size in zip(texts, sizes, strict=True)
    )
    both = ours.keys() & theirs.keys()
    differing = min((id_ for id_ in both if ours[id_] != theirs[id_]), default=None)
    if differing is not None:
        raise other_tokenizer(target.name, name, differing, ours[differing], theirs[differing])
    # Ids without a token, such as ends of text that no tokenizer file names, are known to whoever has a row for them
    target_only = (ours.keys() - theirs.keys()) | set(range(sizes[1], sizes[0]))
    draft_only = (theirs.keys() - ours.keys()) | set(range(sizes[0], sizes[1]))
    if not target_only and not draft_only:
        return None
    ends = (id_ for id_ in (*spec.vocabulary.eos_ids, *known.eos_ids) if id_ in both)
    shared = SharedIds(frozenset(target_only), frozenset(draft_only), next(ends, 0))
    warnings.warn(unshared_warning(target.name, name, shared, texts), PardWarning, stacklevel=3)
    return shared


def unshared_warning(target: str, draft: str, shared: SharedIds, texts: tuple[Text, Text]) -> str:
    """What `shared_ids` warns of."""
    parts = []
    if shared.target_only:
        first = min(shared.target_only)
        instead = texts[1].token(shared.stand_in)
        parts.append(
            f"lacks {len(shared.target_only)} of the target's tokens (the first is {texts[0].token(first)!r}, id "
            f"{first}) and reads {instead!r} in their place"
        )
    if shared.draft_only:
        first = min(shared.draft_only)
        parts.append(
            f"has {len(shared.draft_only)} tokens that the target lacks (the first is {texts[1].token(first)!r}, id "
            f"{first}) and does not propose them"
        )
    return f"{draft}: the draft {' and '.join(parts)}; the text is {target}'s own, fewer drafts may be accepted"


def longer_context(target: Manifest, draft: Manifest | None) -> str:
    """How to get a larger capacity: which of the models bounds it, and what to export. Part of a sentence."""
    models = [target, draft] if draft else [target]
    capacity = min(model.capacity for model in models)
    least = [model for model in models if model.capacity == capacity]
    names = " and ".join(f"the {model.role}" for model in least)
    other = next((f", and the {model.role} for {model.capacity}" for model in models if model not in least), "")
    most = min(model.spec.max_positions for model in least)
    alone = ", or load the target alone" if least == [draft] else ""
    if most <= capacity:
        return f"take other models: {names} cannot be exported for more than {most} tokens{alone}"
    wanted = min([most, *(model.capacity for model in models if model not in least)])
    were = "they were" if len(least) == 2 else "it was"
    return (
        f"export {names} with a larger --context-length, such as {wanted} ({were} exported for {capacity} "
        f"tokens{other}){alone}"
    )


@dataclass(frozen=True, slots=True)
class Opening:
    """How the models of one role are opened, checked and measured."""

    classes: dict[tuple[str, bool], type[Any]]  # by attention variant, and whether shapes are fixed
    single_step: Callable[[Any], Any]  # makes a session that runs another session token by token
    check: Callable[[Any, Callable[[], Any]], Verdict]
    measure: Callable[[Any], Tuning]
    confirms: Callable[[Any, Tuning], bool]  # whether a tuning that was kept still holds


OPENINGS: dict[Role, Opening] = {
    "target": Opening(
        {
            ("gqa", False): FusedTarget,
            ("portable", False): PortableTarget,
            ("portable", True): FixedShapesTarget,
        },
        SingleStepTarget,
        lambda session, reference: check_target(session, reference),
        lambda session: measure_target(session),
        lambda session, tuning: bool(tuning.tried) and confirms(session, tuning),
    ),
    "draft": Opening(
        {
            ("gqa", False): FusedDraft,
            ("portable", False): PortableDraft,
            ("portable", True): FixedShapesDraft,
        },
        SingleStepDraft,
        lambda session, reference: check_draft(session, reference),
        lambda session: measure_draft(session),
        lambda _, tuning: tuning.widths is None,
    ),
}


def open_model(
    artifact: Artifact,
    provider: Provider,
    threads: Threads,
    *,
    measure_again: bool = False,
    progress: Progress = no_progress,
) -> LoadedModel[Any]:
    """Open an artifact; by its role, the model's session is a `TargetSession` or a `DraftSession`.

    On providers other than the CPU, its steps are checked. Then what its steps cost and which widths are exact is
    measured, unless an earlier measurement is kept in the user's cache folder.

    measure_again: check and measure in any case; also the prefill chunk, which takes some seconds on a large model.
    progress: of the stages "open" and "measure", which have one part each.
    Raises BadProvider or BadArtifact if the provider does not start, cannot run the artifact, or computes wrongly.
    """
    opening = OPENINGS[artifact.manifest.role]
    progress("open", 0, 1)
    start = perf_counter()
    session = open_session(artifact, provider, threads)
    seconds = perf_counter() - start
    LOG.info("%s %r opened on %s in %.2f s", artifact.manifest.role, artifact.name, provider.title, seconds)
    progress("open", 1, 1)
    progress("measure", 0, 1)
    verdict = self_check(artifact, session, threads, opening, measure_again)
    if verdict and verdict.steps == "single":
        warning = single_steps_warning(verdict, artifact.name, provider)
        progress("measure", 1, 1)
        return LoadedModel(artifact, opening.single_step(session), single_step_tuning(verdict), verdict, warning)

    def measure() -> Tuning:
        tuning = opening.measure(session)
        if measure_again and artifact.manifest.role == "target":
            return replace(tuning, chunk=measure_prefill_chunk(session))
        return tuning

    path = record_path(artifact.manifest, provider, threads, "tuning")
    tuning = load_or_measure(
        path, Tuning, measure, measure_again=measure_again, fits=lambda known: opening.confirms(session, known)
    )
    progress("measure", 1, 1)
    return LoadedModel(artifact, session, tuning, verdict, slow=slow_reason(verdict, artifact.name, provider))


def open_session(artifact: Artifact, provider: Provider, threads: Threads) -> Any:
    """The artifact's session; BadArtifact if its graphs cannot run on the provider, or are unknown to this version."""
    if reason := incompatibility(artifact.manifest, provider):
        raise BadArtifact(f"{artifact.name}: {reason}")
    if provider.key != CPU.key:
        # Otherwise the error would be that the graph cannot be loaded.
        start_provider(provider)
    return session_class(artifact.manifest)(artifact.folder, artifact.manifest, provider, threads)


def session_class(manifest: Manifest) -> type[Any]:
    """The class of the artifact's session; BadArtifact for an unknown attention variant."""
    classes = OPENINGS[manifest.role].classes
    found = classes.get((manifest.attention, bool(manifest.graphs)))
    if found is None:
        known = ", ".join(sorted({attention for attention, _ in classes}))
        raise BadArtifact(f"attention variant {manifest.attention!r} is not known here, only {known}; update pard-onnx")
    return found


def self_check(
    artifact: Artifact, session: Any, threads: Threads, opening: Opening, measure_again: bool
) -> Verdict | None:
    """The verdict of the self-check, which is kept in a file as the tuning is; None on the CPU.

    The CPU needs no self-check: tuning compares its steps bit for bit.
    """
    provider: Provider = session.provider
    if provider.key == CPU.key:
        return None

    def reference() -> Any:
        try:
            return open_session(artifact, CPU, threads)
        except BadArtifact:  # a graph that the CPU cannot run
            return None

    path = record_path(artifact.manifest, provider, threads, "self-check")
    try:
        verdict = load_or_measure(
            path,
            Verdict,
            lambda: opening.check(session, reference),
            measure_again=measure_again,
            fits=lambda known: known.tolerance == tolerance(artifact.manifest),
        )
    except Failure as error:  # some limits show only in a step, such as missing half precision on WebGPU
        problem = f"provider {provider.title!r} cannot run {artifact.name}: {first_line(error)}"
        raise BadProvider(f"{problem}; {remedy(provider)}") from error
    LOG.info("self-check of %r on %s: %s", artifact.name, provider.title, verdict.describe())
    require_right(verdict, artifact.name, provider)
    return verdict


def single_step_tuning(verdict: Verdict) -> Tuning:
    """The tuning of a session that runs each token in a step of its own."""
    return Tuning(StepCosts(((1, verdict.seconds), (2, 2 * verdict.seconds))), ANY, (1,), chunks=True)
