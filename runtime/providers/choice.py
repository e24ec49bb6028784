"""Which provider runs a model: the one that was named, or the first that is here and computes the model right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from pard_onnx.models.errors import BadArtifact, BadProvider
from pard_onnx.models.manifest import Manifest

from .discovery import here, source
from .table import AUTO_ORDER, CPU, PROVIDERS, Provider, configured, named

AUTO = "auto"
AS_ASKED = "as asked for"


class Opened(Protocol):
    """A model that runs; wrong: why steps of several tokens are not right there, None if they are; slow: why it had
    better run on the CPU, None if it had not."""

    @property
    def wrong(self) -> str | None: ...

    @property
    def slow(self) -> str | None: ...


Model = TypeVar("Model", bound=Opened)


@dataclass(frozen=True, slots=True)
class Candidates:
    """Providers to try in turn; picky: pass over those that run token by token, or slowly; passed: those that were
    not even tried, and why; reason: to take the first one."""

    providers: tuple[Provider, ...]
    reason: str
    picky: bool = False
    passed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """reason: why this provider, and what spoke against those before it."""

    provider: Provider
    reason: str


def candidates(key: str, options: Mapping[str, object] | None = None, *, fallback: bool = False) -> Candidates:
    """What `key` means here. BadProvider for an unknown one, or an absent one without a fallback."""
    if key == AUTO:
        if options:
            raise BadProvider("provider options are of one provider; name it instead of auto")
        found = here()
        providers = tuple(PROVIDERS[name] for name in AUTO_ORDER if name in found)
        return Candidates(providers, "auto: the first in order that is here and computes it right", picky=True)
    provider = configured(named(key), options)
    try:
        source(provider)
    except BadProvider as error:
        if not fallback:
            raise
        return Candidates((CPU,), "fallback", passed=(str(error),))
    after = (CPU,) if fallback and provider.key != CPU.key else ()
    return Candidates((provider, *after), AS_ASKED)


def choose(wanted: Candidates, attempt: Callable[[Provider], Model]) -> tuple[Model, Choice]:
    """The first that opens; what the last one raises, if none does."""
    passed = list(wanted.passed)
    for provider in wanted.providers[:-1]:
        try:
            model = attempt(provider)
        except (BadProvider, BadArtifact) as error:
            passed.append(str(error))
            continue
        against = model.wrong or model.slow if wanted.picky else None
        if against is None:
            return model, Choice(provider, "; ".join((wanted.reason, *passed)))
        passed.append(against)
    last = wanted.providers[-1]
    reason = wanted.reason if wanted.picky or not passed else "fallback"
    return attempt(last), Choice(last, "; ".join((reason, *passed)))


def beside(wanted: Candidates, target: Provider, options: Mapping[str, object] | None = None) -> Candidates:
    """For the draft, where it is not told otherwise: the target's provider, and the CPU if there was a choice."""
    after = (CPU,) if len(wanted.providers) > 1 and target.key != CPU.key else ()
    return replace(wanted, providers=(configured(target, options), *after), reason="as the target", passed=())


FUSED = "gqa"


def misfit(manifest: Manifest, provider: Provider) -> str | None:
    """Why it cannot, with the fix; None if it can."""
    fix = f"export it with pard-export --device {provider.key}"
    if manifest.attention not in provider.attention:
        kind = "one fused operator" if manifest.attention == FUSED else f"of the variant {manifest.attention!r}"
        return f"its attention is {kind}, which {provider.key} lacks or computes wrongly; {fix}"
    if provider.static and not manifest.graphs:
        return f"its graph has dynamic shapes, and {provider.key} needs fixed ones; {fix}"
    return None
