"""`ServedModel`: a checkpoint as another engine loads it, its name on the hub or its folder, and its facts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pard_onnx.models.checkpoints.config import MASK_KEYS
from pard_onnx.models.downloads import Repository, quiet_hub
from pard_onnx.models.errors import BadArtifact, BadCheckpoint, BadInput, shown
from pard_onnx.models.folder_files import has_file
from pard_onnx.models.hub import COMMIT, CONFIG, DEMO, GGUF, HUB_ID, demo_checkpoint, fetch_snapshot
from pard_onnx.models.json_files import read_json
from pard_onnx.models.library import Library
from pard_onnx.models.manifest import FILE_NAME, Manifest, Throughput
from pard_onnx.models.published_drafts import PUBLISHED

LARGEST = 1 << 31  # of ids and sizes


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A checkpoint. None: not known, as the hub cannot be reached."""

    name: str  # hub id, or the absolute path of a folder
    known_as: str  # in tables of published models: the hub id, the folder's name, or that of a shipped model
    revision: str | None = None  # the commit, for hub ids
    local: bool = False  # whether the name is a path of this machine
    family: str | None = None  # model_type in its config.json
    rows: int | None = None  # of its embedding, padding included
    mask_id: int | None = None
    kind: str | None = None  # target, pard or pard2
    exported: Path | None = None  # the exported folder that was named
    throughput: Throughput | None = None  # of a draft that was chosen by measurement

    @property
    def is_draft(self) -> bool | None:
        return None if self.kind is None else self.kind != "target"


def served_model(given: str, revision: str | None = None) -> ServedModel:
    """The checkpoint of a hub id, a folder, or an exported folder; that one by its path or by its name in the library.

    Raises BadInput for an exported folder whose checkpoint nobody else can find, and for what is no model.
    """
    folder = _folder(given)
    if folder is None and revision is None and (entry := Library.of_user().find(given)):
        folder = entry.folder
    if folder is None and revision is None and given in DEMO:
        return _checkpoint(demo_checkpoint(given), given)
    if folder is not None:
        if revision is not None:
            raise BadInput(f"revision {shown(revision)}: {given} is a local folder, which has no revisions")
        return _exported(given, folder) if has_file(folder / FILE_NAME, BadArtifact) else _checkpoint(folder)
    if given.lower().endswith(GGUF) or not HUB_ID.fullmatch(given):
        raise BadInput(f"{shown(given)}: neither a folder nor a hub id (org/name); name a checkpoint in safetensors")
    return _on_hub(given, revision)


def _folder(given: str) -> Path | None:
    try:
        folder = Path(given).expanduser()
        return folder if given and folder.is_dir() else None
    except (OSError, RuntimeError, ValueError):
        return None


def _on_hub(name: str, revision: str | None) -> ServedModel:
    """A repository of the hub; little is known of it where the hub cannot be reached."""
    repository = Repository.ask(name, revision)
    try:
        with quiet_hub():
            # Where the hub has not answered, it is not asked again
            unreachable = repository.sizes is None
            snapshot = fetch_snapshot(name, revision, allow_patterns=[CONFIG, FILE_NAME], local_files_only=unreachable)
    except BadInput:
        if repository.sizes is not None:
            raise
        return ServedModel(name, name, revision, kind=next((one.kind for one in PUBLISHED if one.model == name), None))
    if (snapshot / FILE_NAME).is_file():
        return _exported(name, snapshot)
    return replace(_checkpoint(snapshot), name=name, known_as=name, revision=snapshot.name, local=False)


def _exported(given: str, folder: Path) -> ServedModel:
    """The checkpoint that an exported folder was made from."""
    manifest = Manifest.read(folder)
    source, spec = manifest.source, manifest.spec
    if source.adapter is not None:
        raise BadInput(
            f"{given}: has the adapter {source.adapter.name} merged, so {source.model} is another model; save the "
            "merged model as a checkpoint, and name that"
        )
    throughput = manifest.quantization.throughput if manifest.quantization else None
    if source.model in DEMO:
        return replace(_checkpoint(demo_checkpoint(source.model), source.model), exported=folder, throughput=throughput)
    if not HUB_ID.fullmatch(source.model):
        raise BadInput(
            f"{given}: was exported from {shown(source.model)}, and the folder does not say where that is; name the "
            "checkpoint itself, a folder or a hub id"
        )
    return ServedModel(
        source.model,
        source.model,
        source.revision if source.revision and COMMIT.fullmatch(source.revision) else None,
        family=spec.family,
        rows=spec.vocabulary.rows,
        mask_id=spec.pard.mask_id if spec.pard else None,
        kind=spec.pard.spd_type if spec.pard else "target",
        exported=folder,
        throughput=throughput,
    )


def _checkpoint(folder: Path, known_as: str | None = None) -> ServedModel:
    """The facts in a checkpoint's config.json; of any family, as other engines run more than this package does."""
    if not has_file(folder / CONFIG, BadCheckpoint):
        raise BadCheckpoint(f"{folder}: has no {CONFIG}, so is not a checkpoint")
    config = read_json(folder / CONFIG, BadCheckpoint)
    inner = config.get("text_config")
    text: dict[str, Any] = config | inner if isinstance(inner, dict) else config
    family = config.get("model_type")
    masks = [mask for key in MASK_KEYS if (mask := _whole(config.get(key))) is not None]
    newer = config.get("spd_type") == "pard2" or config.get("pard2") is True
    place = folder.resolve()
    return ServedModel(
        str(place),
        known_as or place.name,
        local=True,
        family=family if isinstance(family, str) else None,
        rows=_whole(text.get("vocab_size")),
        mask_id=masks[0] if masks else None,
        kind="pard2" if newer else "pard" if masks else "target",
    )


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST else None
