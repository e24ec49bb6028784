"""`Repository`: what a repository of the hub holds, asked before anything large of it is fetched."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from .checks import Progress
from .errors import BadInput, Failure
from .hub import at_revision, fetch_snapshot, hub_cache, is_offline, refusal
from .manifest import FILE_NAME, RECORD

MARGIN = 64 << 20  # bytes that stay free
PATIENCE = 10.0  # seconds that the hub may take to answer


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository of the hub at one revision."""

    name: str  # hub id
    revision: str | None
    sizes: tuple[tuple[str, int], ...] | None  # bytes of each file by its path; None: the hub cannot be reached

    @classmethod
    def ask(cls, name: str, revision: str | None = None) -> Repository:
        """Ask the hub for its files. Raises BadInput where it has no such repository or gives no access."""
        if is_offline():
            return cls(name, revision, None)
        from huggingface_hub import HfApi

        try:
            api = HfApi(os.environ.get("HF_ENDPOINT"))
            # A listing of the files would say the same, but is asked for six times where nobody answers
            found = api.model_info(name, revision=revision, files_metadata=True, timeout=PATIENCE)
            return cls(name, revision, tuple((file.rfilename, file.size or 0) for file in found.siblings or ()))
        except Exception as error:
            if problem := refusal(at_revision(name, revision), error):
                raise problem from error
            return cls(name, revision, None)  # fetching tries again, and takes what the hub's cache has

    @property
    def is_export(self) -> bool:
        """Whether it holds an exported model. Where the hub cannot be reached, the hub's cache is asked."""
        if self.sizes is not None:
            return any(path == FILE_NAME for path, _ in self.sizes)
        return isinstance(self._cached(FILE_NAME), str)

    def missing_bytes(self, patterns: Iterable[str]) -> int:
        """Bytes of the files with such names that the hub's cache does not have; 0 where the hub cannot be reached."""
        wanted = (file for file in self.sizes or () if any(fnmatch(file[0], pattern) for pattern in patterns))
        return sum(size for path, size in wanted if not isinstance(self._cached(path), str))

    def require_space(self, folder: Path, needed: int, elsewhere: str) -> None:
        """Failure where the disk of `folder` has less than `needed` bytes free; elsewhere: what to set otherwise."""
        place = next(one for one in (folder, *folder.absolute().parents) if one.is_dir())
        free = shutil.disk_usage(place).free
        if needed and free < needed + MARGIN:
            raise Failure(
                f"{folder}: {free >> 20} MiB free, the download of {self.name} needs {needed + MARGIN >> 20} MiB; free "
                f"some space, or {elsewhere}"
            )

    def _cached(self, path: str) -> object:
        from huggingface_hub import try_to_load_from_cache

        return try_to_load_from_cache(self.name, path, cache_dir=hub_cache(), revision=self.revision)


def fetch_checkpoint(name: str, revision: str | None, patterns: list[str], progress: Progress) -> Repository:
    """Fetch the files with such names into huggingface_hub's cache, after a look at the disk; what it then holds.

    What was fetched before stays there, so after an interruption only the rest is fetched. Raises BadInput or Failure.
    """
    repository = Repository.ask(name, revision)
    if not repository.is_export:
        repository.require_space(hub_cache(), repository.missing_bytes(patterns), "name another folder in HF_HUB_CACHE")
        fetch_snapshot(name, revision, progress, allow_patterns=patterns)
    return repository


def fetch_export(repository: Repository, folder: Path, patterns: list[str], progress: Progress) -> None:
    """Fetch an exported model into `folder`, going on with what an interrupted call left there.

    Raises BadInput or Failure.
    """
    sizes = [(path, size) for path, size in repository.sizes or () if any(fnmatch(path, one) for one in patterns)]
    needed = sum(size for path, size in sizes if not (folder / path).exists())
    repository.require_space(folder, needed, "name another folder in PARD_ONNX_MODELS")
    fetch_snapshot(
        repository.name,
        repository.revision,
        progress,
        allow_patterns=patterns,
        ignore_patterns=[RECORD],
        local_dir=folder,
    )
    if not (folder / FILE_NAME).is_file():
        raise BadInput(f"{repository.name}: has no {FILE_NAME}, so is not an exported model")


@contextmanager
def quiet_hub() -> Iterator[None]:
    """The body's calls of huggingface_hub show no progress bars of their own."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    if shown:
        disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()
