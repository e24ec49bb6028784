"""`Library`: the user's folder of exported models, by name, and which draft belongs to which target.

The folder is PARD_ONNX_MODELS, or `pard-onnx/models` in the user's data folder. Each model is a folder in it, as
pard-export writes them, with a small file (RECORD) that says where the model came from and which draft it has. A folder
that the user puts there by hand needs no such file. What is in the library is believed by its name alone, so a
library that others can write is refused.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from .atomic import exclusive, put_folder, recover, remove_folder
from .cache_folder import distrust
from .checks import nearest_name
from .errors import UNPRINTABLE, BadArtifact, BadInput, Failure, PardWarning, shown
from .folder_files import has_file, is_plain_name
from .json_files import read_json, write_json
from .manifest import FILE_NAME, RECORD, Manifest
from .published_drafts import drafts_by_name
from .records import from_json, to_json
from .system_errors import write_error

VARIABLE = "PARD_ONNX_MODELS"
LONGEST = 160  # bytes of a name: names of scratch files are longer
MOST_RECORD = 1 << 16  # bytes
OWN_DRAFT = "auto"  # for a draft: the one that belongs to the target
LIST = "pard-models list shows what the library has"


@dataclass(frozen=True, slots=True)
class Record:
    """Where a model of the library came from, and the draft that belongs to it."""

    pulled: str  # the hub id or the folder's name that was asked for
    revision: str | None = None  # that was asked for
    options: tuple[str, ...] = ()  # of the export, as `name=value`; what was not given is not here
    draft: str | None = None  # the name of an entry
    no_draft: bool = False  # whether the target was wanted alone


@dataclass(frozen=True, slots=True)
class Entry:
    """A model of the library. Its folder may be damaged: `manifest` and `record` raise BadArtifact then."""

    name: str
    folder: Path

    def manifest(self) -> Manifest:
        return Manifest.read(self.folder)

    def record(self) -> Record | None:
        """None for a folder that the user put there."""
        path = self.folder / RECORD
        if not has_file(path, BadArtifact):
            return None
        return from_json(Record, read_json(path, BadArtifact, most=MOST_RECORD), error=BadArtifact, context=f"{path}: ")

    def write_record(self, record: Record) -> None:
        """Write the record, whole or not at all. Raises Failure."""
        try:
            write_json(self.folder / RECORD, to_json(record))
        except OSError as error:
            raise write_error(self.folder / RECORD, error, f"name another folder in {VARIABLE}") from error

    def model(self) -> str | None:
        """The name that the entry's model has elsewhere, such as its hub id; None where an adapter changed the model.

        Where there is a record, what was pulled counts: a stranger's manifest may claim any source.
        """
        if (record := self.record()) is not None:
            return None if any(option.startswith("adapter=") for option in record.options) else record.pulled
        source = self.manifest().source
        return None if source.adapter else source.model


@dataclass(frozen=True, slots=True)
class Library:
    """The models in one folder, which need not exist."""

    folder: Path

    @classmethod
    def of_user(cls) -> Library:
        """The library of PARD_ONNX_MODELS, or the one in the user's data folder."""
        try:
            if named := os.environ.get(VARIABLE):
                return cls(Path(named).expanduser())
            return cls(data_folder() / "pard-onnx" / "models")
        except RuntimeError as error:
            raise BadInput(f"there is no home folder for the library of models; name a folder in {VARIABLE}") from error

    def entries(self) -> list[Entry]:
        """All models, by name; folders without a manifest are left out. Raises BadInput where others can write."""
        if not os.path.isdir(self.folder):  # noqa: PTH112  unlike Path.is_dir, it raises nothing
            return []
        self._require_own(self.folder)
        try:
            names = sorted(path.name for path in self.folder.iterdir() if is_name(path.name))
        except OSError as error:
            raise Failure(f"{self.folder}: cannot be read: {error.strerror}") from error
        return [Entry(name, self.folder / name) for name in names if self._holds_model(name)]

    def get(self, name: str) -> Entry | None:
        """The model that has exactly this name. Raises BadInput where others could have put it there."""
        if not is_name(name) or not os.path.isdir(self.folder):  # noqa: PTH112
            return None
        self._require_own(self.folder)
        recover(self.folder / name)
        if not self._holds_model(name):
            return None
        self._require_own(self.folder / name)
        return Entry(name, self.folder / name)

    def find(self, name: str) -> Entry | None:
        """The model of this name, or the only target or draft that was made of the model of this name.

        So `org/name` and `name` find `name-int4`. Raises BadInput where several were made of it, or as `get`.
        """
        if (entry := self.get(name)) is not None:
            return entry
        found = [entry for entry in self.entries() if _was_made_of(entry, name)]
        if len(found) > 1:
            names = ", ".join(entry.name for entry in found)
            raise BadInput(f"{name}: the library has several exports of it ({names}); name one of these")
        return self.get(found[0].name) if found else None

    def require(self, name: str) -> Entry:
        """As `get`; BadInput, with the nearest known name, where there is no such model."""
        require_name(name)
        if (entry := self.get(name)) is None:
            raise BadInput(f"{shown(name)}: no such model in the library, {self.folder}{self.nearest(name)}; {LIST}")
        return entry

    def nearest(self, name: str) -> str:
        """The known name that is most similar, as a part of a sentence; "" where none is."""
        found = nearest_name(name.rsplit("/", 1)[-1], [entry.name for entry in self.entries()], least_similarity=0.4)
        return f" (the nearest is {found})" if found else ""

    def draft_of(self, entry: Entry) -> Entry | None:
        """The draft that belongs to a target: the recorded one, or a published one of the target's model.

        Warns with PardWarning where the recorded one is not in the library.
        """
        record = entry.record()
        if record and record.draft is not None:
            found = self.get(require_name(record.draft))
            if found is None:
                warnings.warn(
                    f"{entry.name}: its draft, {record.draft}, is not in the library any more, so decoding is plain; "
                    f"run pard-models pull {record.pulled} to get it again",
                    PardWarning,
                    stacklevel=2,
                )
            return found
        manifest = entry.manifest()
        if manifest.role != "target" or (record and record.no_draft):
            return None
        published = [draft.model for draft in drafts_by_name(manifest.source.model, manifest.spec.family)]
        return next((one for one in self.entries() if _is_draft(one) and _was_made_of(one, *published)), None)

    def targets_of(self, entry: Entry) -> list[Entry]:
        """The targets whose recorded draft is this one."""
        return [one for one in self.entries() if (record := _record_or_none(one)) and record.draft == entry.name]

    def set_draft(self, target: Entry, draft: Entry) -> None:
        """Record that the draft belongs to the target."""
        record = target.record() or Record(target.manifest().source.model)
        if record.draft != draft.name or record.no_draft:
            target.write_record(replace(record, draft=draft.name, no_draft=False))

    def make(self) -> None:
        """Make the folder, for this user alone, if it is missing. Raises BadInput where others can write in it."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(self.folder, error, f"name another folder in {VARIABLE}") from error
        self._require_own(self.folder)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """The folder of the entry `name`, which no other process writes or removes meanwhile. Raises Failure if one
        does already."""
        require_name(name)
        self.make()
        try:
            with exclusive(self.folder / f".{name}.lock"):
                yield self.folder / name
        except BlockingIOError as error:
            if error.filename != str(self.folder / f".{name}.lock"):
                raise
            raise Failure(f"{name}: another pard-models command is writing it now; wait for it, or end it") from None

    def staging(self, name: str) -> Path:
        """The folder in which the entry `name` is made. A process that is killed leaves it there."""
        return self.folder / f".{require_name(name)}.partial"

    def put(self, name: str) -> Entry:
        """Give what was made in the staging folder its name, in place of an entry that has it. Raises Failure."""
        staging, folder = self.staging(name), self.folder / name
        try:
            staging.chmod(0o700)
            if folder.is_symlink():
                folder.unlink()
            put_folder(staging, folder)
        except OSError as error:
            raise Failure(f"{folder}: cannot be written: {error.strerror}; close what uses it and try again") from error
        return Entry(name, folder)

    def remove(self, name: str) -> None:
        """Remove a model, and what an interrupted pull left of it. Of a link, the link is removed and no more."""
        with self.writing(name) as folder:
            _remove(folder)
            _remove(self.staging(name))

    def discard(self, name: str) -> None:
        """Remove what an interrupted process left in the staging folder."""
        _remove(self.staging(name))

    def _holds_model(self, name: str) -> bool:
        return os.path.lexists(self.folder / name / FILE_NAME)

    def _require_own(self, folder: Path) -> None:
        if problem := distrust(folder.stat(), of_root=True):  # as of an image or a system's administrator
            raise BadInput(
                f"{folder}: {problem}, so the models in it may be theirs; run chmod -R go-w on a folder of your own, "
                f"or name another one in {VARIABLE}"
            )


def _remove(folder: Path) -> None:
    try:
        if folder.is_symlink():
            folder.unlink()
        elif folder.exists():
            remove_folder(folder)
    except OSError as error:
        raise Failure(f"{folder}: cannot be removed: {error.strerror}; close what uses it") from error


def data_folder() -> Path:
    """The user's folder for data of programs, by the rules of the platform."""
    if sys.platform == "win32":
        variable, usual = "LOCALAPPDATA", "AppData/Local"
    elif sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support"
    else:
        variable, usual = "XDG_DATA_HOME", ".local/share"
    base = os.environ.get(variable)
    # A relative path in XDG_DATA_HOME is invalid by its specification, and would change with the current folder
    return Path(base) if base and Path(base).is_absolute() else Path.home() / usual


def is_name(name: str) -> bool:
    """Whether a model of the library may have this name: a plain name on every system, that no option begins with."""
    plain = is_plain_name(name) and len(name.encode()) <= LONGEST
    return plain and name[0] not in ".-" and not UNPRINTABLE.search(name)


def require_name(name: str) -> str:
    """The name. Raises BadInput for what no model of the library can be called."""
    if not is_name(name):
        raise BadInput(
            f"{shown(name)}: is no name of a model in the library: at most {LONGEST} bytes, no path, none of "
            f'\\ / : " < > | ? *, no . or - at the beginning; {LIST}'
        )
    return name


def _was_made_of(entry: Entry, *models: str) -> bool:
    """Whether the entry is of one of these models, which are named by a hub id or its last part."""
    try:
        known = entry.model()
    except BadInput:  # damaged: it is found by its own name only
        return False
    return known is not None and any(model in (known, known.rsplit("/", 1)[-1]) for model in models)


def _is_draft(entry: Entry) -> bool:
    try:
        return entry.manifest().role == "draft"
    except BadInput:
        return False


def _record_or_none(entry: Entry) -> Record | None:
    try:
        return entry.record()
    except BadInput:
        return None
