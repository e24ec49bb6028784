"""Model names to real folders: local ones, the shipped pair, and the Hugging Face hub's.

These environment variables of huggingface_hub apply: HF_TOKEN, HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_ENDPOINT.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from . import demo
from .atomic import atomic_folder, recover, sweep
from .cache_folder import cache_folder, distrust, made_cache_folder, made_private
from .checks import Progress, no_progress
from .download_progress import DownloadProgress
from .errors import BadArtifact, BadInput, Failure, PardError, shown
from .folder_files import has_file, read_file
from .library import LIST, Library, is_name
from .logs import logger
from .manifest import FILE_NAME, Manifest, Source
from .system_errors import STOPS, write_error

LOG = logger(__name__)
EXPORTED_DEMO = {"demo-target": demo.EXPORTED_TARGET, "demo-draft": demo.EXPORTED_DRAFT}  # as the CPU runs them
DEMO = {
    "demo-target": demo.TARGET,
    "demo-draft": demo.DRAFT,
    "demo-pard2-draft": demo.PARD2_DRAFT,
    "demo-ar-draft": demo.AR_DRAFT,
}
SDIST = "pip download --no-deps --no-binary pard-onnx pard-onnx"  # the source archive, which has all of DEMO
HUB_ID = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*(?<![.-])", re.ASCII)
# No pickles but the one of PARD-2 drafts, which a reader of this package's own reads (checkpoints.torch_file)
CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.jinja", "warp_model.bin"]
ADAPTER_FILES = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
]
CONFIG = "config.json"
GGUF, GGUF_MAGIC = ".gguf", b"GGUF"
MOST_METADATA = 4096  # bytes of huggingface_hub's note beside a file
HUB_GGUF = re.compile(r"([^/]+/[^/]+)/((?:[^/]+/)*[^/]+\.gguf)", re.IGNORECASE)  # a file of a hub's repository
GGUF_ENDING = re.compile(r"(-\d{5}-of-\d{5})?\.gguf$", re.IGNORECASE)  # with the number of a part
COMMIT = re.compile(r"[0-9a-f]{40}")
DOWNLOADS = Path(".cache", "huggingface", "download")
ARTIFACT_FILES = ["*.json", "*.jinja", "*.onnx", "*.data"]


def resolve_checkpoint(name: str, revision: str | None = None, progress: Progress = no_progress) -> tuple[Path, Source]:
    """The folder of a checkpoint, or a GGUF file.

    name: of a shipped model (one of DEMO), a local folder or GGUF file, a hub id (`org/name`), or a GGUF file of one
    (`org/name/file.gguf`).

    A hub id is fetched into huggingface_hub's cache, or found there if the hub cannot be reached; `revision`
    is a branch, tag or commit of it. Raises BadInput, or Failure when a download breaks off.
    progress: of the stage "download", in bytes, by any thread; without it, huggingface_hub shows bars of its own.
    """
    if name in DEMO:
        return demo_checkpoint(name), Source(name)
    folder = _local(name)
    if folder:
        _refuse_revision(name, revision)
        return folder, Source(folder.resolve().name)
    file = _gguf_file(name)
    if file:
        _refuse_revision(name, revision)
        return file, Source(GGUF_ENDING.sub("", file.name))
    if (match := HUB_GGUF.fullmatch(name)) and HUB_ID.fullmatch(match[1]):
        return _hub_gguf(match[1], match[2], revision)
    _refuse_file(name, "a checkpoint folder with config.json, tokenizer.json and safetensors, or a GGUF file")
    _require_hub_id(name, "a checkpoint folder")
    snapshot = fetch_snapshot(name, revision, progress, allow_patterns=CHECKPOINT_FILES)
    if not (snapshot / CONFIG).exists() and not (snapshot / FILE_NAME).exists():
        raise BadInput(
            f"{name}: has no {CONFIG}, so is not a checkpoint; of a repository of GGUF files name one, {name}/FILE.gguf"
        )
    return snapshot, Source(name, snapshot.name)  # a snapshot's folder is named by its commit


def demo_checkpoint(name: str) -> Path:
    """The checkpoint folder of one of DEMO. Raises BadInput where the package was installed from a wheel, which has
    only the exported models."""
    folder = DEMO[name]
    if not folder.is_dir():
        raise BadInput(
            f"{name}: wheels have no checkpoints of the demo pair, only its exported models. Run {SDIST}, unpack the "
            f"archive that it fetches, and name the folder models/demo/{folder.name} in it"
        )
    return folder


def _hub_gguf(repository: str, name: str, revision: str | None) -> tuple[Path, Source]:
    """The GGUF file of that name in a repository of the hub, fetched or found in huggingface_hub's cache."""
    if _local(repository) or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise BadInput(f"{repository}/{name}: there is no such file")
    snapshot = fetch_snapshot(repository, revision, allow_patterns=[escape(name)])
    if not (snapshot / name).is_file():
        raise BadInput(f"{repository}/{name}: the repository has no such file; look for the name on its page")
    return snapshot / name, Source(GGUF_ENDING.sub("", f"{repository}/{name}"), snapshot.name)


def resolve_adapter(name: str) -> tuple[Path, Source]:
    """The folder of a LoRA adapter: a local folder, or a hub id (`org/name`). Errors as in `resolve_checkpoint`."""
    folder = _local(name)
    if folder:
        return folder, Source(folder.resolve().name)
    _refuse_file(name, "the folder of an adapter, with adapter_config.json and adapter_model.safetensors")
    _require_hub_id(name, "the folder of an adapter")
    snapshot = fetch_snapshot(name, None, allow_patterns=ADAPTER_FILES)
    return snapshot, Source(name, snapshot.name)


def resolve_artifact(name: str | Path, revision: str | None = None, progress: Progress = no_progress) -> Path:
    """The real folder of an exported model: a local one, one of the user's library by its name, one of EXPORTED_DEMO,
    or the hub id of one.

    A local folder wins over a model of the library, and that one over the hub. With a revision it is the hub's.

    ONNX Runtime refuses weights reached through links that leave the folder, and the hub's cache is made of
    them: hub ids are fetched into a folder of this package's cache, local folders of links are copied there.
    Raises BadInput, or Failure when a download breaks off. progress: as of `resolve_checkpoint`.
    """
    folder = _local(name)
    if folder:
        _refuse_revision(str(name), revision)
        return _without_links(folder)
    name = str(name)
    if revision is None and (entry := Library.of_user().find(name)):
        return _without_links(entry.folder)
    if revision is None and name in EXPORTED_DEMO:
        return _without_links(EXPORTED_DEMO[name])
    if name in DEMO:
        raise BadInput(f"{name}: is a checkpoint; run pard-export --model {name} first and name the folder it writes")
    if _gguf_file(name):
        raise BadInput(f"{name}: is a checkpoint; run pard-export --model {name} first and name the folder it writes")
    _refuse_file(name, "a folder that pard-export writes")
    _require_hub_id(name, "an exported folder", _library_advice(name))
    # quote: branches and tags may have slashes
    folder = artifacts_folder() / f"{name.replace('/', '--')}@{quote(revision or 'main', safe='')}"
    require_own(folder)
    with made_private():
        found = fetch_snapshot(name, revision, progress, allow_patterns=ARTIFACT_FILES, local_dir=folder)
    if not has_file(found / FILE_NAME, BadArtifact):
        raise BadInput(f"{name}: has no {FILE_NAME}, so is not an exported model; run pard-export --model {name}")
    return found


def own_draft(target: str) -> Path | None:
    """The folder of the draft that belongs to a target of the user's library; None for every other target.

    target: as the user names it. Raises BadArtifact where the library's files say nonsense.
    """
    if _local(target) or (entry := Library.of_user().find(target)) is None:
        return None
    found = Library.of_user().draft_of(entry)
    return found.folder if found else None


def _library_advice(name: str) -> str:
    """What to do about a name that is in no place, as a part of a sentence."""
    advice = "; pard-export --model CHECKPOINT writes such a folder, pard-models pull ORG/NAME puts one in the library"
    nearest = Library.of_user().nearest(name) if is_name(name) else ""
    return f"{advice}{nearest}, and {LIST}"


def artifacts_folder() -> Path:
    """The folder of models in this package's cache. Raises BadInput where others could have put models there."""
    folder = cache_folder() / "artifacts"
    for one in (folder.parent, folder):
        require_own(one)
    return folder


def require_own(folder: Path) -> None:
    """BadInput for a folder in the cache that others can write, or that is another user's."""
    if folder.exists() and (problem := distrust(folder.stat())):
        raise BadInput(
            f"{folder}: {problem}, so the models in it may be theirs; run chmod 700 on a folder of your own, or name "
            "another one in PARD_ONNX_CACHE"
        )


def fetched_commit(folder: Path) -> str | None:
    """The commit of the hub's repository that an artifact folder was fetched from; None for a folder of another kind.

    huggingface_hub writes it beside the files, one for each. Only this package's own folders are asked: any other
    folder may claim any commit.
    """
    if folder.parent != cache_folder() / "artifacts":
        return None
    try:
        lines = (
            read_file(folder / DOWNLOADS / f"{FILE_NAME}.metadata", MOST_METADATA, BadArtifact).decode().splitlines()
        )
    except (OSError, ValueError):
        return None
    return lines[0] if lines and COMMIT.fullmatch(lines[0]) else None


def _local(name: str | Path) -> Path | None:
    try:
        folder = Path(name).expanduser()
        recover(folder)
        return folder if name != "" and folder.is_dir() else None  # Path("") is the current folder
    except (OSError, RuntimeError):  # a name too long for a path; ~ without a home
        return None


def _local_file(name: str) -> Path | None:
    try:
        file = Path(name).expanduser()
        return file if file.is_file() else None
    except (OSError, RuntimeError, ValueError):  # as in _local; a null character
        return None


def _gguf_file(name: str) -> Path | None:
    """The local file of this name if it is GGUF, by its ending or by its first bytes."""
    file = _local_file(name)
    if file is None or file.suffix.lower() == GGUF:
        return file
    try:
        with file.open("rb") as stream:
            return file if stream.read(len(GGUF_MAGIC)) == GGUF_MAGIC else None
    except OSError:
        return None


def _refuse_revision(name: str, revision: str | None) -> None:
    if revision is not None:
        raise BadInput(f"revision {shown(revision)}: {name} is a local path, which has no revisions; leave it out")


def _refuse_file(name: str, wanted: str) -> None:
    """BadInput where the name is that of a single file, which is of another kind than is wanted."""
    if _local_file(name):
        raise BadInput(f"{name}: is a file; name {wanted}, or a hub id of one")
    if name.lower().endswith((GGUF, ".onnx")):
        raise BadInput(f"{name}: there is no such file; name {wanted}, or a hub id of one")


def _require_hub_id(name: str, wanted: str, advice: str = "") -> None:
    if not HUB_ID.fullmatch(name):
        raise BadInput(f"{name!r}: neither {wanted} nor a hub id (org/name){advice}")


def fetch_snapshot(name: str, revision: str | None, progress: Progress = no_progress, **options: Any) -> Path:
    """The folder of the files that are fetched now, or are in huggingface_hub's cache.

    options: of huggingface_hub's snapshot_download; with local_files_only the hub is not asked.
    """
    if progress is no_progress:
        return _fetched(name, revision, **options)
    reports = DownloadProgress(progress)
    try:
        folder = _fetched(name, revision, **options, tqdm_class=reports.bar_class())
    except Exception:
        if reports.error:  # the user's own, such as one that ends the download
            raise reports.error from None
        raise
    reports.finish()
    return folder


def _fetched(name: str, revision: str | None, **options: Any) -> Path:
    at = at_revision(name, revision)
    LOG.info("%r is fetched from the hub, or from its cache", at)
    try:
        return _download(name, revision, **options)
    except Exception as error:  # the HTTP library's own errors, another library in every major version
        if problem := refusal(at, error):
            raise problem from error
        if isinstance(error, OSError) and error.errno in STOPS:  # the disk's; what was there before is not asked for
            raise _disk_problem(error, **options) from error
        return _cached(at, error, name, revision, **options)


def _disk_problem(error: OSError, local_dir: Path | None = None, **_: Any) -> PardError:
    if local_dir is not None:
        return write_error(local_dir, error, "name another folder in PARD_ONNX_CACHE or PARD_ONNX_MODELS")
    return write_error(hub_cache(), error, "name another folder in HF_HUB_CACHE")


def hub_cache() -> Path:
    """The folder of huggingface_hub's cache."""
    from huggingface_hub import constants

    return Path(os.environ.get("HF_HUB_CACHE") or constants.HF_HUB_CACHE)


def at_revision(name: str, revision: str | None) -> str:
    return f"{name} at revision {revision}" if revision else name


def refusal(at: str, error: Exception) -> BadInput | None:
    """The error for a user whom the hub gives nothing, at: what of; None for a connection that broke."""
    from huggingface_hub import errors  # imported late: it takes a while, and most names are folders

    if isinstance(error, errors.GatedRepoError):
        return BadInput(f"{at}: is gated; ask for access on its page and set HF_TOKEN to your token")
    if isinstance(error, errors.RepositoryNotFoundError):
        return BadInput(
            f"{at}: neither a folder here nor a repository on the hub; if it is private, set HF_TOKEN to your token"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return BadInput(f"{at}: the repository is there, that revision is not")
    if isinstance(error, errors.LocalEntryNotFoundError):
        reason = "HF_HUB_OFFLINE is set" if is_offline() else "the hub cannot be reached"
        return BadInput(f"{at}: neither a folder here nor (whole) in the hub's cache, and {reason}")
    answer = error.response if isinstance(error, errors.HfHubHTTPError) else None
    if answer is not None and answer.status_code in (401, 403):
        return BadInput(f"{at}: the hub refuses access; set HF_TOKEN to a token that may read it")
    return None


def _cached(at: str, error: Exception, name: str, revision: str | None, **options: Any) -> Path:
    """After a broken download: the snapshot in the cache if it is complete. Raises Failure otherwise."""
    try:
        return _download(name, revision, **options | {"local_files_only": True})
    except Exception:
        text = (str(error).splitlines() or [""])[0]
        raise Failure(f"{at}: the download broke off: {type(error).__name__}: {text}") from error


def _download(name: str, revision: str | None, *, local_files_only: bool = False, **options: Any) -> Path:
    from huggingface_hub import snapshot_download

    # These variables are read now: huggingface_hub read them when it was imported
    return Path(
        snapshot_download(
            name,
            revision=revision,
            cache_dir=os.environ.get("HF_HUB_CACHE"),
            endpoint=os.environ.get("HF_ENDPOINT"),
            local_files_only=local_files_only or is_offline(),
            **options,
        )
    )


def is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _without_links(folder: Path) -> Path:
    """`folder`, or a copy in the cache of the files that its manifest lists, if any of them is a link to elsewhere.

    Raises BadArtifact for a link that leaves the folder, but for those of the hub's cache (see folder_files).
    """
    if not has_file(folder / FILE_NAME, BadArtifact):
        return folder  # which is refused when its manifest is read
    names = [FILE_NAME, *(file.name for file in Manifest.read(folder).files)]
    files = [folder / name for name in names if has_file(folder / name, BadArtifact)]
    root = folder.resolve()
    if all(path.resolve().is_relative_to(root) for path in files):
        return folder
    facts = [(path.name, str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    made_cache_folder()
    copy = artifacts_folder() / "linked" / hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
    for one in (copy.parent, copy):
        require_own(one)
    sweep(copy.parent)
    if not copy.is_dir():
        try:
            with atomic_folder(copy) as partial:
                for path in files:
                    _clone(path.resolve(), partial / path.name)
        except OSError as error:
            if not copy.is_dir():  # else another process was faster
                raise write_error(copy, error, "name another folder in PARD_ONNX_CACHE or PARD_ONNX_MODELS") from error
    return copy


def _clone(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)  # takes no space; ONNX Runtime sees an ordinary file
    except (OSError, NotImplementedError):  # another disk, or a file system without hard links
        shutil.copyfile(source, target)
