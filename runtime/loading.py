"""What `load` does: the models of a pair are found, verified, opened and measured, or taken from other pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pard_onnx.models.checks import Progress, no_progress
from pard_onnx.models.errors import BadInput, shown
from pard_onnx.models.spec import Role, TargetFeatures

from .decoding.draft_mode import DraftMode, features_to_read
from .decoding.shared_ids import SharedIds
from .model import Artifact, LoadedModel, open_artifact, open_model, shared_ids
from .providers.choice import AS_ASKED, ProviderCandidates, draft_candidates, open_first, provider_candidates
from .providers.threads import Threads

Source = str | LoadedModel[Any]  # the name of an artifact, or a model that another pair has open
DEFAULT_PROVIDER = "cpu"


@dataclass(frozen=True, slots=True)
class Wanted:
    """One model of a pair, as the user asked for it. BadInput for options of a model that is not there, or is open."""

    role: Role
    source: Source | None  # None: there is no such model
    provider: str | None = None  # None: not given
    options: Mapping[str, object] | None = None  # of the provider
    revision: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.options, Mapping | None):
            name = "provider_options" if self.role == "target" else "draft_provider_options"
            raise BadInput(f"{name} must be a mapping of option names to values, not {shown(self.options)}")
        if self.revision is not None and (not isinstance(self.revision, str) or not self.revision.strip()):
            name = "revision" if self.role == "target" else "draft_revision"
            raise BadInput(f"{name} must be a branch, tag or commit of a hub id, not {shown(self.revision)}")
        given = {"a provider for": self.provider, "provider options of": self.options, "a revision of": self.revision}
        for what, value in given.items():
            if value is None or isinstance(self.source, str) or (isinstance(value, Mapping) and not value):
                continue
            problem = f"no {self.role}; name one" if self.source is None else f"the {self.role} is open already"
            fix = ", or leave it out" if self.source is None else "; leave it out"
            raise BadInput(f"{what} the {self.role} ({shown(value)}), but {problem}{fix}")

    def candidates(self, fallback: bool) -> ProviderCandidates:
        """The providers to try: of a model that is open, its own."""
        if isinstance(self.source, LoadedModel):
            return ProviderCandidates((self.source.provider,), AS_ASKED)
        return provider_candidates(self.provider, self.options, fallback=fallback)


@dataclass(frozen=True, slots=True)
class Opened:
    """The models of a pair."""

    target: LoadedModel[Any]
    draft: LoadedModel[Any] | None
    shared: SharedIds | None  # see `model.shared_ids`
    features: TargetFeatures | None  # what the draft reads of the target; None where it reads nothing


def open_pair(
    target: Wanted, draft: Wanted, threads: Threads, *, mode: DraftMode, fallback: bool, progress: Progress
) -> Opened:
    """Open both models, or the target alone; errors and warnings as of `load`.

    Both artifacts are found and compared before either is opened, which takes longer.
    """
    for_target = target.candidates(fallback)
    for_draft = draft.candidates(fallback) if draft.provider is not None else None
    target_artifact, draft_artifact, shared = found(target, progress), None, None
    if draft.source is not None:
        draft_artifact = found(draft, progress)
        drafts = draft_artifact.manifest
        shared = shared_ids(target_artifact, draft_artifact.name, draft_artifact.folder, drafts.spec, drafts.sizes)
    names = target_artifact.name, draft_artifact.name if draft_artifact else ""
    facts = draft_artifact.manifest if draft_artifact else None
    features = features_to_read(mode, target_artifact.manifest, facts, names)
    target_model = opened(target, target_artifact, for_target, threads, progress)
    if draft_artifact is None:
        return Opened(target_model, None, None, None)
    for_draft = for_draft or draft_candidates(for_target, target_model.provider, draft.options)
    draft_model = opened(draft, draft_artifact, for_draft, threads, progress)
    return Opened(target_model, draft_model, shared, features)


def found(wanted: Wanted, progress: Progress) -> Artifact:
    """The artifact of a model: verified now, or that of the model that is open."""
    if isinstance(wanted.source, LoadedModel):
        return wanted.source.artifact
    assert wanted.source is not None
    return open_artifact(wanted.source, wanted.role, wanted.revision, of_role(progress, wanted.role))


def opened(
    wanted: Wanted, artifact: Artifact, candidates: ProviderCandidates, threads: Threads, progress: Progress
) -> LoadedModel[Any]:
    """The artifact on the first of these providers that runs it; or the model that is open."""
    if isinstance(wanted.source, LoadedModel):
        return wanted.source.lend()
    tell = of_role(progress, wanted.role)
    model, choice = open_first(candidates, lambda provider: open_model(artifact, provider, threads, progress=tell))
    return replace(model, reason=choice.reason)


def of_role(progress: Progress, role: Role) -> Progress:
    """A `Progress` whose stages get the role's name behind theirs."""
    if progress is no_progress:
        return no_progress
    return lambda stage, done, total: progress(f"{stage} {role}", done, total)
