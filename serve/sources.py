"""`Source`: a model that a server can load, a target with its draft."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pard_onnx.models.errors import BadArtifact, BadInput
from pard_onnx.models.hub import own_draft
from pard_onnx.models.library import OWN_DRAFT, Entry, Library
from pard_onnx.models.logs import logger
from pard_onnx.models.manifest import Manifest
from pard_onnx.runtime.pair import Pair, load
from pard_onnx.runtime.providers.table import CPU
from pard_onnx.runtime.sessions.device_cache import cache_bytes

from .settings import Settings

LOG = logger(__name__)


@dataclass(frozen=True, slots=True)
class Source:
    """A target and its draft, by what `load` takes."""

    name: str  # by which requests name it
    target: str
    drafts: tuple[str, ...] = ()  # the first one that fits is used; none: plain decoding
    aliases: tuple[str, ...] = ()  # further names
    arguments: tuple[tuple[str, Any], ...] = ()  # further keyword arguments of `load`: revisions
    must_fit: bool = False  # whether a draft that does not fit is an error


def named_source(target: str, draft: str | None, name: str | None = None, **arguments: Any) -> Source:
    """The model that a user names. draft: as of `load`; name: by which requests name it, or None for the target's."""
    if draft == OWN_DRAFT:
        found = own_draft(target) if arguments.get("revision") is None else None
        draft = str(found) if found else None
    usual = Path(target).name or target
    given = tuple((key, value) for key, value in arguments.items() if value is not None)
    return Source(name or usual, target, (draft,) if draft else (), (target, usual), given, must_fit=True)


def sources_of(library: Library) -> tuple[Source, ...]:
    """The targets in a folder of models, each with its draft: the recorded one, else the published one, else those of
    the same family that the folder has, of which the first that fits is used."""
    entries = library.entries()
    manifests = {entry.name: found for entry in entries if (found := _manifest(entry)) is not None}
    drafts = [entry for entry in entries if (found := manifests.get(entry.name)) and found.role == "draft"]
    out: list[Source] = []
    for entry in entries:
        manifest = manifests.get(entry.name)
        if manifest is None or manifest.role != "target":
            continue
        alias = (manifest.source.model,) if not manifest.source.adapter else ()
        out.append(Source(entry.name, str(entry.folder), _drafts(library, entry, manifest, drafts, manifests), alias))
    return tuple(out)


def _drafts(
    library: Library, entry: Entry, manifest: Manifest, drafts: list[Entry], manifests: dict[str, Manifest]
) -> tuple[str, ...]:
    try:
        record = entry.record()
        if record is not None and (record.no_draft or record.draft is not None):
            own = library.get(record.draft) if record.draft is not None else None
            return (str(own.folder),) if own else ()
        if (own := library.draft_of(entry)) is not None:
            return (str(own.folder),)
    except BadInput:
        return ()
    family = manifest.spec.family
    return tuple(str(one.folder) for one in drafts if manifests[one.name].spec.family == family)


def _manifest(entry: Entry) -> Manifest | None:
    try:
        return entry.manifest()
    except BadInput as error:
        LOG.debug("%s: left out: %s", entry.name, error)
        return None


def open_source(source: Source, settings: Settings) -> Pair:
    """Load the model. Raises as `load`."""
    options: dict[str, Any] = {
        **settings.load,
        **dict(source.arguments),
        "queue": settings.max_queue,
        "max_live": settings.max_live,
        "cache_bytes": settings.cache_bytes,
    }
    for draft in source.drafts:
        try:
            return load(source.target, draft, **options)
        except BadArtifact:
            if source.must_fit:
                raise
    without = {key: value for key, value in options.items() if not key.startswith("draft_")}
    return load(source.target, None, **without)


def required_bytes(source: Source, settings: Settings) -> int:
    """The most memory that the model takes: its weights, the KV caches of live generations, and those that are kept.

    0 where it is not known before the model is loaded, as for a hub id.
    """
    target, drafts = Path(source.target), [Path(draft) for draft in source.drafts[:1]]
    if not all(folder.is_dir() for folder in (target, *drafts)):
        return 0
    manifests = [Manifest.read(target)]
    for draft in drafts:
        with suppress(BadArtifact):  # `open_source` says what is wrong with it, or leaves it out
            manifests.append(Manifest.read(draft))
    rows = sum(cache_bytes(manifest, CPU) for manifest in manifests)
    return sum(manifest.weight_bytes for manifest in manifests) + settings.max_live * rows + settings.cache_bytes
