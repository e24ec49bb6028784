"""Which provider runs a model: the one that the user named, or the first that is installed and computes correctly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from pard_onnx.models.errors import BadArtifact, BadProvider
from pard_onnx.models.logs import logger
from pard_onnx.models.manifest import Manifest

from .discovery import as_installed, available_providers
from .table import AUTO_ORDER, CPU, PROVIDERS, Provider, provider_named, with_options

LOG = logger(__name__)
AUTO = "auto"
AS_ASKED, FALLBACK = "as asked for", "fallback"  # reasons


class OpenedModel(Protocol):
    """What `open_first` needs to know about a model that was opened."""

    @property
    def warning(self) -> str | None:
        """Why every token is run in a step of its own; None where wider steps are correct."""
        ...

    @property
    def slow(self) -> str | None:
        """Why the CPU is the better choice; None where it is not."""
        ...


AnyModel = TypeVar("AnyModel", bound=OpenedModel)


@dataclass(frozen=True, slots=True)
class ProviderCandidates:
    """Providers to try, in this order."""

    providers: tuple[Provider, ...]
    reason: str  # why the first one is taken
    selective: bool = False  # whether providers are rejected that run token by token, or slowly
    rejected: tuple[str, ...] = ()  # why other providers are not tried at all


@dataclass(frozen=True, slots=True)
class ProviderChoice:
    """The provider that runs a model."""

    provider: Provider
    reason: str  # why it was taken, and why the providers before it were rejected


def provider_candidates(
    key: str | None, options: Mapping[str, object] | None = None, *, fallback: bool = False
) -> ProviderCandidates:
    """The providers to try for `key`, which names a provider or is "auto".

    Raises BadProvider if the provider is unknown, or is not installed and there is no fallback.
    """
    if isinstance(key, str) and key == AUTO:
        if options:
            raise BadProvider("provider options are of one provider; name it instead of auto")
        found = available_providers()
        providers = tuple(as_installed(PROVIDERS[name]) for name in AUTO_ORDER if name in found)
        reason = "auto: the first in order that is here and computes it right"
        return ProviderCandidates(providers, reason, selective=True)
    provider = with_options(provider_named(key), options)
    try:
        provider = as_installed(provider)
    except BadProvider as error:
        if not fallback:
            raise
        return ProviderCandidates((CPU,), FALLBACK, rejected=(str(error),))
    after = (CPU,) if fallback and provider.key != CPU.key else ()
    return ProviderCandidates((provider, *after), AS_ASKED)


def open_first(
    candidates: ProviderCandidates, open_on: Callable[[Provider], AnyModel]
) -> tuple[AnyModel, ProviderChoice]:
    """The model opened on the first candidate that does not fail and is not rejected.

    The last candidate is taken even where the model is slow on it; its error is raised if it fails.
    """
    rejected = list(candidates.rejected)
    for provider in candidates.providers[:-1]:
        try:
            model = open_on(provider)
        except (BadProvider, BadArtifact) as error:
            objection: str | None = str(error)
        else:
            objection = model.warning or model.slow if candidates.selective else None
            if objection is None:
                return model, ProviderChoice(provider, "; ".join((candidates.reason, *rejected)))
        LOG.info("provider %s is passed over: %s", provider.title, objection)
        rejected.append(str(objection))
    last = candidates.providers[-1]
    reason = candidates.reason if candidates.selective or not rejected else FALLBACK
    return open_on(last), ProviderChoice(last, "; ".join((reason, *rejected)))


def draft_candidates(
    candidates: ProviderCandidates, target: Provider, options: Mapping[str, object] | None = None
) -> ProviderCandidates:
    """The providers to try for a draft if the user named none for it: the target's, and then the CPU if the target had
    several candidates.

    candidates: the target's; target: the provider that runs the target.
    """
    after = (CPU,) if len(candidates.providers) > 1 and target.key != CPU.key else ()
    providers = (with_options(target, options), *after)
    return replace(candidates, providers=providers, reason="as the target", rejected=())


FUSED = "gqa"  # the attention variant that is one operator, GroupQueryAttention


def on_separate_devices(target: Provider, draft: Provider) -> bool:
    """Whether the target and the draft run on different devices, so that both can work at the same time."""
    return (target.key, target.device) != (draft.key, draft.device)


def incompatibility(manifest: Manifest, provider: Provider) -> str | None:
    """Why the provider cannot run the artifact's graphs, with the fix; None if it can."""
    fix = f"export it with pard-export --device {provider.key}"
    if manifest.attention not in provider.attention:
        kind = "one fused operator" if manifest.attention == FUSED else f"of the variant {manifest.attention!r}"
        return f"its attention is {kind}, which {provider.key} lacks or computes wrongly; {fix}"
    if provider.static and not manifest.graphs:
        return f"its graph has dynamic shapes, and {provider.key} needs fixed ones; {fix}"
    return None
