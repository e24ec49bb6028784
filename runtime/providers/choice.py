"""Which provider runs a model: the one that was named, or the first that is installed and computes it correctly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from pard_onnx.models.errors import BadArtifact, BadProvider
from pard_onnx.models.manifest import Manifest

from .discovery import available_providers, provider_source
from .table import AUTO_ORDER, CPU, PROVIDERS, Provider, configured, named

AUTO = "auto"
AS_ASKED = "as asked for"


class OpenedModel(Protocol):
    """What `open_first` asks of a model that was opened."""

    @property
    def warning(self) -> str | None:
        """Why every token takes a step of its own; None where wider steps are right."""
        ...

    @property
    def slow(self) -> str | None:
        """Why the CPU would be faster; None where it would not."""
        ...


AnyModel = TypeVar("AnyModel", bound=OpenedModel)


@dataclass(frozen=True, slots=True)
class ProviderCandidates:
    """Providers to try in turn."""

    providers: tuple[Provider, ...]
    reason: str  # for taking the first one
    selective: bool = False  # pass over those that run token by token, or slowly
    rejected: tuple[str, ...] = ()  # why others were not even tried


@dataclass(frozen=True, slots=True)
class ProviderChoice:
    """A provider that was taken."""

    provider: Provider
    reason: str  # for taking it, and against those before it


def provider_candidates(
    key: str, options: Mapping[str, object] | None = None, *, fallback: bool = False
) -> ProviderCandidates:
    """The providers that `key` stands for. BadProvider for an unknown one, or an absent one without a fallback."""
    if key == AUTO:
        if options:
            raise BadProvider("provider options are of one provider; name it instead of auto")
        found = available_providers()
        providers = tuple(PROVIDERS[name] for name in AUTO_ORDER if name in found)
        reason = "auto: the first in order that is here and computes it right"
        return ProviderCandidates(providers, reason, selective=True)
    provider = configured(named(key), options)
    try:
        provider_source(provider)
    except BadProvider as error:
        if not fallback:
            raise
        return ProviderCandidates((CPU,), "fallback", rejected=(str(error),))
    after = (CPU,) if fallback and provider.key != CPU.key else ()
    return ProviderCandidates((provider, *after), AS_ASKED)


def open_first(
    candidates: ProviderCandidates, open_on: Callable[[Provider], AnyModel]
) -> tuple[AnyModel, ProviderChoice]:
    """The first that opens; if none does, the last one's error is raised."""
    rejected = list(candidates.rejected)
    for provider in candidates.providers[:-1]:
        try:
            model = open_on(provider)
        except (BadProvider, BadArtifact) as error:
            rejected.append(str(error))
            continue
        objection = model.warning or model.slow if candidates.selective else None
        if objection is None:
            return model, ProviderChoice(provider, "; ".join((candidates.reason, *rejected)))
        rejected.append(objection)
    last = candidates.providers[-1]
    reason = candidates.reason if candidates.selective or not rejected else "fallback"
    return open_on(last), ProviderChoice(last, "; ".join((reason, *rejected)))


def draft_candidates(
    candidates: ProviderCandidates, target: Provider, options: Mapping[str, object] | None = None
) -> ProviderCandidates:
    """For a draft that no provider was named for: the target's provider, then the CPU if the target had a choice.

    candidates: the target's; target: the provider that was taken for it.
    """
    after = (CPU,) if len(candidates.providers) > 1 and target.key != CPU.key else ()
    providers = (configured(target, options), *after)
    return replace(candidates, providers=providers, reason="as the target", rejected=())


FUSED = "gqa"


def on_separate_devices(target: Provider, draft: Provider) -> bool:
    """Whether the two have devices of their own, so that one works while the other does."""
    return (target.key, target.device) != (draft.key, draft.device)


def incompatibility(manifest: Manifest, provider: Provider) -> str | None:
    """Why the provider cannot run the artifact's kind of graphs, with the fix; None if it can."""
    fix = f"export it with pard-export --device {provider.key}"
    if manifest.attention not in provider.attention:
        kind = "one fused operator" if manifest.attention == FUSED else f"of the variant {manifest.attention!r}"
        return f"its attention is {kind}, which {provider.key} lacks or computes wrongly; {fix}"
    if provider.static and not manifest.graphs:
        return f"its graph has dynamic shapes, and {provider.key} needs fixed ones; {fix}"
    return None
