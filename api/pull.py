"""`pull`: a model and the draft that belongs to it, exported or fetched into the user's library."""

from __future__ import annotations

import argparse
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pard_onnx.cli import export_job, stages
from pard_onnx.export_command import job_of_model
from pard_onnx.models.checkpoints.config import MASK_KEYS, pard_of, read_config
from pard_onnx.models.checkpoints.vocabulary import FILE as TOKENIZER
from pard_onnx.models.downloads import Repository, fetch_checkpoint, fetch_export, quiet_hub
from pard_onnx.models.errors import BadArtifact, BadInput, PardWarning
from pard_onnx.models.folder_files import has_file
from pard_onnx.models.hub import (
    ARTIFACT_FILES,
    CHECKPOINT_FILES,
    DEMO,
    HUB_GGUF,
    HUB_ID,
    demo_checkpoint,
    fetch_snapshot,
)
from pard_onnx.models.library import Entry, Library, Record
from pard_onnx.models.manifest import FILE_NAME, RECORD, Manifest
from pard_onnx.models.precision import FLOATS
from pard_onnx.models.published_drafts import draft_candidates, drafts_by_name
from pard_onnx.models.system_errors import write_error
from pard_onnx.runtime.decoding.draft_mode import mismatch
from pard_onnx.runtime.model import Artifact, open_artifact, other_tokenizer
from pard_onnx.runtime.text.tokenizer import Text

State = Literal["present", "exported", "fetched", "copied"]
# What changes an export, by argparse's names; a record keeps those that were given
FOR_BOTH = (
    "quality",
    "calibration",
    "context_length",
    "kv_cache",
    "device",
    "attention",
    "io_dtype",
    "opset",
    "static",
)
FOR_ONE = (
    "precision",
    "recipe",
    "block_size",
    "budget",
    "role",
    "adapter",
    "draft_vocabulary",
    "vocabulary_text",
    "features",
    "for_draft",
)
OPTIONS = (*FOR_BOTH, *FOR_ONE, "draft_length")
TOKENIZER_FILES = [FILE_NAME, "config.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json"]


@dataclass(frozen=True, slots=True)
class Pulled:
    """A model of the library, and how it came there."""

    entry: Entry
    state: State


@dataclass(frozen=True, slots=True)
class Work:
    """How a model that is not in the library comes there."""

    name: str  # of the entry
    make: Callable[[Path], None]  # makes the model's folder at this path; it may go on with what is there
    state: State


def pull(library: Library, options: argparse.Namespace) -> tuple[Pulled, Pulled | None]:
    """The model of `options.model` and its draft, None without one. Raises BadInput or Failure.

    What an earlier call has done is not done again, so after an interruption the same call goes on.
    """
    if options.no_draft:
        _refuse_draft_options(options, "--no-draft is given")
    target = pull_model(library, options)
    if target.entry.manifest().role == "draft":
        _refuse_draft_options(options, f"{options.model} is a draft itself")
        return target, None
    if options.no_draft:
        record = target.entry.record() or Record(options.model)
        target.entry.write_record(replace(record, draft=None, no_draft=True))
        return target, None
    draft = pull_draft(library, options, target.entry)
    if draft is not None:
        library.set_draft(target.entry, draft.entry)
        _tell_of_features(options, target.entry, draft.entry)
    return target, draft


def _tell_of_features(options: argparse.Namespace, target: Entry, draft: Entry) -> None:
    """A PardWarning where the draft reads hidden states that the target does not give, with the command that helps."""
    ours, theirs, names = target.manifest(), draft.manifest(), (target.name, draft.name)
    wanted = theirs.spec.pard.features if theirs.spec.pard else None
    if wanted is None or mismatch(ours, theirs, wanted, names) is None:
        return
    layers = tuple(dict.fromkeys((*wanted.layers_of(ours.spec.layers), *ours.feature_layers)))
    problem = mismatch(replace(ours, feature_layers=layers), theirs, wanted, names)  # that no export would mend
    if problem is None:
        given = (one for one in given_options(options) if not one.startswith(("features=", "for_draft=")))
        same = "".join(
            f" --{name.replace('_', '-')}={value}" for name, _, value in (one.partition("=") for one in given)
        )
        again = f"pard-models pull {options.model}{same} --force --features={','.join(map(str, layers))}"
        problem = (
            f"{draft.name}: reads hidden states that {target.name} does not give; pull it again: {again} "
            f"--draft {draft.name}"
        )
    warnings.warn(
        f"{problem}; until then the draft proposes without them, and fewer of its tokens may be accepted",
        PardWarning,
        stacklevel=2,
    )


def _refuse_draft_options(options: argparse.Namespace, reason: str) -> None:
    """BadInput for options of a draft where there is none."""
    for name in ("draft", "draft_precision", "draft_revision"):
        if (value := getattr(options, name)) is not None:
            raise BadInput(f"--{name.replace('_', '-')} {value}: {reason}; leave one of them out")


def pull_model(library: Library, options: argparse.Namespace) -> Pulled:
    """The model of `options.model` alone. Raises BadInput where another model has its name, unless --force is given."""
    record = Record(options.model, options.revision, given_options(options))
    if not options.force and (known := _known(library, options.name, record)):
        return Pulled(known, "present")
    work = _planned(options, record)
    name = work.name
    if options.suffix and (taken := library.get(name)) and not _is_same(taken, record):
        name += options.suffix
    with library.writing(name) as folder:
        entry = library.get(name)
        if entry is None and folder.exists():
            raise BadInput(f"{folder}: is there already and is no exported model; move it away")
        if entry is not None and not options.force:
            if _is_same(entry, record):  # made by another process since the look above
                return Pulled(entry, "present")
            raise BadInput(
                f"{name}: the library has a model of this name, {_origin(entry)}; add --force to replace it, or --name "
                "for another name"
            )
        _make(library, name, record, work, afresh=options.force)
        return Pulled(library.put(name), work.state)


def _make(library: Library, name: str, record: Record, work: Work, *, afresh: bool) -> None:
    """Make the model in its staging folder, going on with what an earlier process left there of the same model.

    afresh: a whole export that was left there is not taken, as it may be of an older commit.
    """
    staging = Entry(name, library.staging(name))
    if staging.folder.exists() and _recorded(staging) != record:
        library.discard(name)
    if work.state == "exported" and not afresh and _is_same(staging, record):  # only the renaming is left to do
        return
    if work.state == "fetched":
        staging.folder.mkdir(exist_ok=True)
        staging.write_record(record)  # first: what is there of a download belongs to it
    work.make(staging.folder)
    staging.write_record(record)


def given_options(options: argparse.Namespace) -> tuple[str, ...]:
    """The options that change an export, as far as they were given."""
    values = {name: getattr(options, name) for name in OPTIONS}
    return tuple(f"{name}={value}" for name, value in values.items() if value not in (None, "auto"))


def _known(library: Library, name: str | None, record: Record) -> Entry | None:
    """The entry that an earlier pull of the same model with the same options has made."""
    entries = library.entries() if name is None else [entry for entry in [library.get(name)] if entry]
    return next((entry for entry in entries if _is_same(entry, record)), None)


def _is_same(entry: Entry, record: Record) -> bool:
    """Whether the entry is whole, and was pulled as the record says."""
    try:
        entry.manifest()
    except BadInput:
        return False
    return _recorded(entry) == record


def _recorded(entry: Entry) -> Record | None:
    """The entry's record without its draft; None for one that cannot be read."""
    try:
        found = entry.record()
    except BadInput:
        return None
    return replace(found, draft=None, no_draft=False) if found else None


def _origin(entry: Entry) -> str:
    """Where an entry came from, for an error."""
    try:
        record = entry.record()
    except BadInput:
        return "which is damaged"
    if record is None:
        return "which pard-models has not put there"
    with_options = f" with {', '.join(record.options)}" if record.options else ""
    return f"pulled from {record.pulled}{with_options}"


# Where a model comes from


def _planned(options: argparse.Namespace, record: Record) -> Work:
    """Find out what the model is: an exported folder, the hub's repository of one, or a checkpoint."""
    model: str = options.model
    if folder := _local_export(model):
        if options.revision is not None:
            raise BadInput(f"--revision {options.revision}: {model} is a local path, which has no revisions")
        _refuse_export_options(record)
        return Work(options.name or folder.resolve().name, lambda staging: _copy(folder, staging), "copied")
    repository = _asked(options)
    if repository and repository.is_export:
        _refuse_export_options(record)
        name = options.name or model.rsplit("/", 1)[-1]
        return Work(name, lambda staging: _fetch(repository, staging), "fetched")
    with quiet_hub():  # what it asks for is there already
        job = job_of_model(options, model)

    def make(staging: Path) -> None:
        export_job(replace(job, output=staging, force=True))

    return Work(options.name or job.output.name, make, "exported")


def _local_export(model: str) -> Path | None:
    """The local folder of this name, if it is an exported model."""
    try:
        folder = Path(model).expanduser()
        return folder if model and folder.is_dir() and has_file(folder / FILE_NAME, BadArtifact) else None
    except (OSError, RuntimeError, ValueError):
        return None


def _asked(options: argparse.Namespace) -> Repository | None:
    """The hub's repository of the model, of which a checkpoint was fetched; None for a local model."""
    model: str = options.model
    gguf = HUB_GGUF.fullmatch(model)
    name = gguf[1] if gguf else model
    try:
        local = Path(model).expanduser().exists() or Path(name).is_dir()
    except (OSError, RuntimeError, ValueError):
        local = True  # no name of a repository either; exporting says so
    if local or model in DEMO or not HUB_ID.fullmatch(name):
        return None
    with stages() as progress:
        return fetch_checkpoint(name, options.revision, [gguf[2]] if gguf else CHECKPOINT_FILES, progress)


def _refuse_export_options(record: Record) -> None:
    """BadInput for options of an export where there is nothing to export."""
    if record.options:
        name, _, value = record.options[0].partition("=")
        raise BadInput(
            f"--{name.replace('_', '-')} {value}: {record.pulled} is an exported model, which is taken as it is; leave "
            "the option out, or pull the checkpoint that it was exported from"
        )


def _fetch(repository: Repository, staging: Path) -> None:
    """Fetch an exported model, and check its files. What its manifest does not list is removed."""
    with stages() as progress:
        fetch_export(repository, staging, ARTIFACT_FILES, progress)
    manifest = Manifest.read(staging)
    manifest.verify(staging)
    for path in staging.iterdir():
        if path.name not in (FILE_NAME, RECORD) and path.name not in manifest.sizes:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _copy(folder: Path, staging: Path) -> None:
    """Copy an exported folder: its manifest and the files that this lists."""
    manifest = Manifest.read(folder)
    manifest.verify(folder)
    try:
        staging.mkdir(exist_ok=True)
        for name in (*manifest.sizes, FILE_NAME):
            shutil.copyfile(folder / name, staging / name)
    except OSError as error:
        raise write_error(staging, error, "name another folder in PARD_ONNX_MODELS") from error


# The draft of a target


def pull_draft(library: Library, options: argparse.Namespace, target: Entry) -> Pulled | None:
    """The draft that --draft names, or the published one that has the target's tokens; None where there is none.

    Raises BadInput for a named draft that does not fit. A published one that does not fit, or that the hub does not
    give, is left out with a PardWarning.
    """
    if options.draft is None and not (options.force or options.draft_precision or options.draft_revision):
        record = target.record()
        if record and record.draft and (found := library.get(record.draft)):
            return Pulled(found, "present")
    artifact = replace(open_artifact(target.folder, "target"), name=target.name)
    if options.draft is not None:
        return _drafted(library, options, artifact, options.draft)
    source, family = artifact.manifest.source.model, artifact.manifest.spec.family
    reasons = []
    for one in draft_candidates(source, family):
        try:
            return _drafted(library, options, artifact, one.model)
        except BadInput as error:
            reasons.append(str(error))
    known = f" ({'; '.join(reasons)})" if reasons else ""
    newer = ", ".join(one.model for one in drafts_by_name(source, family, "pard2"))
    more = f"; {newer} is published for it: give --draft and --for-draft with this name" if newer else ""
    warnings.warn(
        f"{target.name}: no published PARD draft was found for it{known}{more}; name one with --draft, or --no-draft "
        "for none",
        PardWarning,
        stacklevel=2,
    )
    return None


def _drafted(library: Library, options: argparse.Namespace, target: Artifact, draft: str) -> Pulled:
    """The named draft, in the library and with the target's tokens. Raises BadInput where it does not fit."""
    entry = library.get(draft)
    if entry is not None and (options.draft_precision or options.draft_revision):
        raise BadInput(f"{draft}: is in the library as it is; leave --draft-precision and --draft-revision out")
    entry = entry or _reusable(library, target.manifest, draft, options)
    if entry is not None:
        pulled = Pulled(entry, "present")
    else:
        folder = _tokenizer_folder(draft, options.draft_revision)
        if folder is not None:  # before the weights are fetched and exported
            _require_draft(draft, folder)
            _require_same_tokens(target, draft, folder)
        pulled = pull_model(library, _options_of_draft(options, draft, folder))
    if pulled.entry.manifest().role != "draft":
        raise BadInput(f"{draft}: is a target, not a draft; name a PARD draft")
    _require_same_tokens(target, draft, pulled.entry.folder)
    return pulled


def _reusable(library: Library, target: Manifest, draft: str, options: argparse.Namespace) -> Entry | None:
    """A draft of the library that was made of the same model, for the target's device and context length, and with the
    options that were given for drafts now."""
    if options.force or options.draft_revision:
        return None
    fixed = {"context_length", "device"}  # the manifests have them
    wanted = {
        one for one in given_options(_options_of_draft(options, draft, None)) if one.partition("=")[0] not in fixed
    }
    for entry in library.entries():
        try:
            manifest, model, record = entry.manifest(), entry.model(), entry.record()
        except BadInput:  # damaged
            continue
        enough = min(target.capacity, manifest.spec.max_positions)
        same = model == draft and manifest.role == "draft" and manifest.device == target.device
        if same and manifest.capacity >= enough and wanted <= set(record.options if record else ()):
            return library.get(entry.name)
    return None


def _tokenizer_folder(draft: str, revision: str | None) -> Path | None:
    """A folder with the draft's config and tokenizer, which are fetched alone; None for a GGUF file."""
    if draft in DEMO:
        return demo_checkpoint(draft)
    try:
        local = Path(draft).expanduser()
        if draft and local.is_dir():
            return local
    except (OSError, RuntimeError, ValueError):
        pass  # pulling it says what is wrong with the name
    if not HUB_ID.fullmatch(draft):
        return None
    with quiet_hub():
        return fetch_snapshot(draft, revision, allow_patterns=TOKENIZER_FILES)


def _require_draft(name: str, folder: Path) -> None:
    """BadInput for a checkpoint that is no PARD draft, or one of a kind that is not run here."""
    if has_file(folder / FILE_NAME, BadArtifact):
        return
    config = read_config(folder)
    if pard_of(config, config.integer("vocab_size")) is None:
        raise BadInput(f"{name}: is no PARD draft, as its config.json has none of {', '.join(MASK_KEYS)}; name one")


def _require_same_tokens(target: Artifact, name: str, folder: Path) -> None:
    """BadArtifact where an id that both tokenizers have stands for different tokens; padding does not count."""
    if not (folder / TOKENIZER).is_file():
        raise BadArtifact(f"{name}: has no {TOKENIZER}, so its tokens cannot be compared with the target's")
    texts = target.text(), Text(folder, None)
    ours, theirs = ({id_: token for token, id_ in text.vocabulary().items()} for text in texts)
    size = target.manifest.spec.vocabulary.size
    differing = [id_ for id_ in ours.keys() & theirs.keys() if id_ < size and ours[id_] != theirs[id_]]
    if differing:
        first = min(differing)
        raise other_tokenizer(target.name, name, first, ours[first], theirs[first])


def _options_of_draft(options: argparse.Namespace, draft: str, folder: Path | None) -> argparse.Namespace:
    """The options of a pull of the draft: those that both models share, as far as the draft can have them."""
    own = argparse.Namespace(**vars(options))
    for name in FOR_ONE:
        setattr(own, name, None)
    own.model, own.name, own.role = draft, None, "auto"
    own.precision, own.revision = options.draft_precision, options.draft_revision
    if own.precision in FLOATS or options.recipe is not None:
        own.quality = own.calibration = None
    if own.context_length is not None and folder is not None and not has_file(folder / FILE_NAME, BadArtifact):
        longest = read_config(folder).integer("max_position_embeddings", own.context_length)
        own.context_length = min(own.context_length, longest)
    # For the case that an export with other options has the usual name
    values = (option.partition("=")[2] for option in given_options(own))
    own.suffix = "".join("-" + re.sub(r"[^A-Za-z0-9.]", "_", Path(value).name) for value in values)
    return own
